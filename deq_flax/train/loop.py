"""The training run: steps, evaluations, checkpoints and log lines over time."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from flax import nnx
from jax.sharding import Mesh

from deq_flax.checkpoints.checkpoints import CheckpointOptions, Checkpoints
from deq_flax.checkpoints.loading import load_params, load_params_except_head
from deq_flax.checkpoints.retry import RetryingSaver
from deq_flax.checkpoints.workdir_lock import WorkdirLock
from deq_flax.devices.mesh import MeshOptions, check_batch, local_rows, make_mesh, place, put_batch
from deq_flax.devices.processes import is_first, print_once
from deq_flax.errors import DivergedError, UserError
from deq_flax.run_log.pictures import make_pictures
from deq_flax.run_log.progress import Clock, device_summary, parameter_table
from deq_flax.run_log.run_log import RunLog, SilentRunLog
from deq_flax.task import HasHead, HasVocabulary, Metrics, Task
from deq_flax.train.evaluate import SPLITS, divide, evaluate, fetch, merge, summarize
from deq_flax.train.optimizer import OptimizerOptions, make_optimizer
from deq_flax.train.phases import Phase, Phases
from deq_flax.train.step import TrainState, make_eval_step, make_train_step, split_model, state_shardings
from deq_flax.train.stop import stop_signal


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Section `train` of a config."""

    steps: int
    """Training steps."""
    seed: int = 0
    """Seed of the initial parameters, the order of examples, augmentation, dropout and the phases."""
    log_every: int = 100
    """Steps between log lines."""
    eval_every: int = 1000
    """Steps between evaluations; 0: only at the end."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    accumulate: int = 1
    """Micro-batches of a step, taken one after the other; data.batch_size counts all of them."""
    ema_decay: float = 0.0
    """Decay of a running average of the parameters, which is evaluated instead of them; 0: none."""
    max_skipped: int = 10
    """Updates in a row that are skipped because something was not finite before the run gives up."""

    def __post_init__(self):
        for name in ("steps", "log_every", "checkpoint_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.eval_every < 0:
            raise UserError(f"train.eval_every must be at least 0 (only at the end), not {self.eval_every}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"train.ema_decay must be at least 0 (off) and below 1, not {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run."""

    step: int
    metrics: Mapping[str, Mapping[str, float]]
    """Numbers of the best checkpoint by split; empty when interrupted."""
    interrupted: bool = False
    resumed: bool = False


def train(
    task: Task,
    *,
    workdir: str | Path,
    config: Mapping[str, Any],
    phases: Phases,
    optimizer: OptimizerOptions,
    train: TrainOptions,
    mesh: MeshOptions,
    checkpoint: CheckpointOptions,
) -> RunResult:
    """Train from the last checkpoint in `workdir` to step `train.steps`, then evaluate the best checkpoint.

    A run that was stopped at any moment continues from its last checkpoint, bit for bit as if it had not been stopped. SIGTERM
    and SIGINT end it at the next step with a checkpoint.

    Args:
      task: the task.
      workdir: holds checkpoints, metrics.jsonl, config.json, the vocabulary and TensorBoard events.
      config: the whole resolved config, as plain data, for the record.
      phases: the way each step solves, from section `deq`.
      optimizer, train, mesh, checkpoint: these sections of the config.

    Raises:
      UserError: an option is out of range, or the workdir is not usable or in use.
      DivergedError: too many updates in a row were not finite.
    """
    with ExitStack() as stack:
        lock = stack.enter_context(WorkdirLock(workdir)) if is_first() else None  # one for all processes of a run
        devices = make_mesh(mesh)
        check_batch(devices, batch_size=task.batch_size, accumulate=train.accumulate, eval_batch_size=task.eval_batch_size)
        run = Run(task, phases, train, devices, optimizer)
        checkpoints = stack.enter_context(Checkpoints(Path(workdir) / "checkpoints", checkpoint))
        start = run.restore(checkpoints, checkpoint.init_from)
        log = stack.enter_context(RunLog(workdir, start or None) if is_first() else SilentRunLog())
        log.write_config(config, start)
        if isinstance(task, HasVocabulary) and task.vocabulary_file is not None:
            log.write_text(*task.vocabulary_file)
        interrupted = False

        def may_save() -> bool:
            if lock is not None:
                lock.check()
            return log.flush()

        if start < train.steps:
            log.print(f"{parameter_table(run.state.params)}\n{device_summary(devices, run.state)}")
            saver = RetryingSaver(checkpoints, {"config": config}, may_save=may_save)
            interrupted = run.run(start, saver, log)
        if interrupted:
            return RunResult(step=run.step, metrics={}, interrupted=True)
        results, best = run.final(checkpoints)
        return RunResult(step=best, metrics=results, resumed=start >= train.steps)


class Run:
    """The model, its state and its compiled steps."""

    def __init__(self, task: Task, phases: Phases, options: TrainOptions, devices: Mesh, optimizer: OptimizerOptions):
        self.task, self.phases, self.options, self.devices = task, phases, options, devices
        transformation, schedule = make_optimizer(optimizer, options.steps)
        built = task.build_model(nnx.Rngs(options.seed))
        graphdef, params, variables = split_model(built)
        # The state holds the arrays; of the model, its shapes are enough from here on.
        self.model = nnx.merge(graphdef, *jax.eval_shape(lambda: (params, variables)))
        shardings = state_shardings(self.model, transformation, params, devices, ema=bool(options.ema_decay))
        params = place(params, shardings.params)
        self.state = TrainState(
            params=params,
            variables=place(variables, shardings.variables),
            opt_state=jax.jit(transformation.init, out_shardings=shardings.opt_state)(params),
            carry=place(task.fresh_carry(self.model, task.batch_size), shardings.carry),
            ema=jax.tree.map(jnp.copy, params) if options.ema_decay else None,
            skipped=place(np.zeros((), np.int32), shardings.skipped),
        )
        self.step = 0
        self.window: Mapping[str, Any] = {}
        self.clock = Clock()
        self.train_step = make_train_step(
            task,
            graphdef,
            transformation,
            schedule,
            devices,
            shardings,
            seed=options.seed,
            accumulate=options.accumulate,
            ema_decay=options.ema_decay,
        )
        self.eval_step = make_eval_step(task, graphdef, devices, phases.evaluation)
        self._draw = make_pictures(task, graphdef, devices, phases.evaluation.solve())
        self._compiled: set[Phase] = set()

    def restore(self, checkpoints: Checkpoints, init_from: str) -> int:
        """Continue from the newest whole checkpoint, or start from the weights of another run. Returns the steps done."""
        restored = checkpoints.restore_latest(**self.state.checkpoint_trees())
        if restored is not None:
            state = self.state._replace(params=restored.params, **restored.rest)
            self.state = state if state.ema is None else state._replace(ema=restored.ema)
            self.step = restored.step
            self.window = restored.meta.get("window", {})  # a checkpoint of an earlier version has none
            print_once(f"continuing from the checkpoint of step {restored.step}")
        elif init_from:
            weights, variables = self._pretrained(init_from)
            self.state = self.state._replace(params=weights, variables=variables)
            if self.state.ema is not None:
                self.state = self.state._replace(ema=jax.tree.map(jnp.copy, weights))
        return self.step

    def _pretrained(self, path: str) -> tuple[Any, Any]:
        """Parameters and variables of another run, whose model may have another head if the task names its own."""
        print_once(f"starting from the weights in {path}")
        if not isinstance(self.task, HasHead):
            loaded = load_params(path, self.state.params, self.state.variables)
            return loaded.eval_params, loaded.variables
        restored = load_params_except_head(path, self.state.params, self.state.variables, self.task.head)
        for what in ("loaded", "fresh", "unused"):
            names = getattr(restored, what)
            shown = "" if what == "loaded" or not names else f": {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
            print_once(f"  {what}: {len(names)} arrays{shown}")
        return restored.params, restored.variables

    def run(self, start: int, saver: RetryingSaver, run_log: RunLog) -> bool:
        """Run steps `start` to the last. Returns True if a signal ended the run early."""
        options = self.options
        batches = self.task.train_batches(start, local_rows(self.devices, self.task.batch_size))
        log = Log(self, run_log, start, self.window)
        self.clock.lap()
        with stop_signal() as stop:
            for number in range(start, options.steps):
                self.dispatch(number, next(batches), log)
                done, stopping = self.step, stop.requested(self.step)
                last = stopping or done == options.steps
                evaluates = done == options.steps or (options.eval_every and done % options.eval_every == 0)
                saves = evaluates or last or done % options.checkpoint_every == 0
                if saves or (done % options.log_every == 0 and saver.needs_retry()):
                    log.flush()
                    with self.clock.pause():
                        metrics = self.evaluate("valid", run_log) if evaluates else None
                        save = saver.save_final if last else saver.save
                        save(done, self.state.checkpoint_trees(), metrics, window=log.window())
                if stopping and done < options.steps:
                    log.flush()
                    run_log.print(f"{stop.received}: stopped at step {done}; the same command continues from here")
                    return True
            log.flush()
        return False

    def dispatch(self, number: int, batch: Any, log: "Log") -> None:
        """Start step `number` on the devices."""
        phase, scalars = self.phases.phase(number), self.phases.scalars(number)
        arguments = (put_batch(self.devices, batch, self.task.batch_size), scalars, np.int32(number))
        if phase in self._compiled:
            self.state, metrics = self.train_step(self.state, *arguments, phase=phase)
        else:
            log.flush()
            with self.clock.pause():
                log.run_log.print(f"compiling: {phase}")
                self.state, metrics = self.train_step(self.state, *arguments, phase=phase)
                jax.block_until_ready(metrics)
            self._compiled.add(phase)
        self.step = number + 1
        log.add(self.step, metrics)

    def evaluate(self, split: str, run_log: RunLog | None = None) -> dict[str, float]:
        """Evaluate the running average if there is one, else the parameters."""
        weights = self.state.eval_params, self.state.variables
        if run_log is not None:
            run_log.end_line()
        metrics = self.evaluate_weights(*weights, split)
        if run_log is not None:
            run_log.write(self.step, split, metrics)
            run_log.print_progress(self.step, self.options.steps, metrics, split)
            for name, picture in self._draw(*weights).items():
                run_log.write_picture(self.step, name, picture)
        return metrics

    def evaluate_weights(self, params: Any, variables: Any, split: str) -> dict[str, float]:
        """Evaluate the given weights."""
        return evaluate(self.task, self.model, self.eval_step, self.devices, params, variables, split)

    def final(self, checkpoints: Checkpoints) -> tuple[dict[str, dict[str, float]], int]:
        """The numbers of the best checkpoint by split, and its step."""
        checkpoints.wait()
        best = checkpoints.restore_best(params=self.state.params, variables=self.state.variables)
        results = {split: self.evaluate_weights(best.eval_params, best.variables, split) for split in SPLITS}
        return results, best.step


class Log:
    """Average metrics between log lines, one step behind the device, so that the host never waits for the step it just sent.

    `window`: the result of the method `window` when the checkpoint of step `start` was saved.
    """

    def __init__(self, run: Run, run_log: RunLog, start: int, window: Mapping[str, Any]):
        self._run, self.run_log = run, run_log
        self._pending: tuple[int, Metrics] | None = None
        self._totals: Metrics = {name: _average(*sums) for name, sums in window.items()}
        self._since = start  # start of the rates, which are those of this process

    def add(self, step: int, metrics: Metrics) -> None:
        """Add the metrics of a step that has just been dispatched; read those of the step before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Read the pending metrics, waiting for the device if need be."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        metrics = fetch(metrics)
        self._check_finite(step, metrics)
        self._totals = merge(self._totals, metrics)
        options = self._run.options
        if step % options.log_every == 0 or step == options.steps:
            self._write(step)

    def window(self) -> dict[str, Any]:
        """The sums and counts since the last log line, as JSON: a run that is resumed here logs the same averages next."""
        return {name: [np.asarray(m.total).tolist(), np.asarray(m.count).tolist()] for name, m in self._totals.items()}

    def _write(self, step: int) -> None:
        seconds = self._run.clock.lap() / (step - self._since)
        averages = divide(self._totals)
        skipped = averages.pop("skipped", 0.0)
        summary = summarize(self._run.task, "train", averages) | {"steps_per_second": 1.0 / seconds}
        summary |= self._run.task.throughput(seconds)
        if skipped:
            summary["skipped"] = skipped
        self.run_log.write(step, "train", summary)
        self.run_log.print_progress(step, self._run.options.steps, summary)
        self._totals, self._since = {}, step

    def _check_finite(self, step: int, metrics: Metrics) -> None:
        in_a_row = int(metrics["skipped"].total)
        if in_a_row >= self._run.options.max_skipped:
            raise DivergedError(
                f"the loss or gradient was not finite {in_a_row} steps in a row, up to step {step}: lower "
                "optimizer.learning_rate or raise deq.max_steps; the last good checkpoint is kept"
            )


def _average(total: Any, count: Any) -> clu_metrics.Average:
    """A metric on the host, in float64 as `fetch` gives it."""
    total, count = np.asarray(total, np.float64), np.asarray(count, np.float64)
    return clu_metrics.Average(total=total, count=count)  # ty: ignore[unknown-argument]
