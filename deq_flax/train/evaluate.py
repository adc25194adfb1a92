"""Evaluation: every example of a split once, with a carry of its own."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import metrics as clu_metrics
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from deq_flax.checkpoints.loading import find_checkpoint, load_meta, load_params
from deq_flax.devices.mesh import FSDP, MeshOptions, by_batch, check_batch, local_rows, make_mesh, place, put_batch, replicated
from deq_flax.devices.processes import is_first
from deq_flax.devices.sharding import gathered_shardings
from deq_flax.equilibrium import Solver, fixed_point, spectral_radius
from deq_flax.errors import UserError
from deq_flax.task import ChecksWeights, HasEquation, HasRestarts, Metrics, Task
from deq_flax.train.phases import Phases, StepScalars
from deq_flax.train.step import STEP_METRICS, EvalStep, make_eval_step, split_model

SPLITS = ("valid", "test")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Section `eval` of a config: additions to an evaluation of a checkpoint (`--mode eval`)."""

    spectral_radius: bool = False
    """Report the spectral radius of the Jacobian of f at the equilibria of the first validation batch; below 1, plain iteration
    converges."""
    max_steps_sweep: tuple[int, ...] = ()
    """Limits on the evaluations of f to evaluate with as well, for a table of score against evaluations; none above
    deq.eval_max_steps, or deq.max_steps where that is 0. 0: the initial guess alone, evaluated once for its residual. The last
    evaluation of a solver only measures what it returns; with gradient unroll and eval_unrolled it improves the state too."""
    restarts: int = 1
    """Random starts that each puzzle is solved from. The answer of lowest residual counts; that of most starts is scored beside
    it."""
    slots: int = 0
    """Solve each batch of images or puzzles through this many slots of each device, so that one that has converged makes room
    for the next: faster where they need different numbers of evaluations, with a data.eval_batch_size of many times the slots.
    forward_nfe then counts evaluations of as many samples. 0: all samples of a batch at once."""

    def check(self, max_steps: int | None) -> None:
        """Raise UserError for an option that does not suit the equilibrium; `max_steps`: its limit, None without one."""
        if self.restarts < 1 or (max_steps is None and self.restarts > 1):
            raise UserError(f"eval.restarts must be at least 1, and 1 for a model without an equilibrium, not {self.restarts}")
        if self.slots < 0 or (max_steps is None and self.slots):
            raise UserError(f"eval.slots is {self.slots}: it must be 0, or at least 1 for a model with an equilibrium")
        if max_steps is None and self.spectral_radius:
            raise UserError("eval.spectral_radius: this model has no equilibrium; set it to False")
        for steps in self.max_steps_sweep:
            if max_steps is None:
                raise UserError("eval.max_steps_sweep: there is no equilibrium to limit; set it to ()")
            if not 0 <= steps <= max_steps:
                raise UserError(
                    f"eval.max_steps_sweep holds {steps}: whole numbers from 0 to the limit of evaluation, "
                    f"deq.eval_max_steps or else deq.max_steps ({max_steps}), are possible"
                )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The results of a checkpoint."""

    step: int
    metrics: Mapping[str, Mapping[str, float]]
    """Numbers by split."""
    sweep: list[dict[str, Any]]
    """One row for each split and limit on the evaluations, which it holds as `split` and `max_steps`."""


class Loaded(NamedTuple):
    """A checkpoint on a mesh."""

    model: nnx.Module
    """The model; of its arrays, only the shapes are the checkpoint's."""
    graphdef: Any
    weights: tuple[Any, Any]
    """Parameters and variables, whole on every device but for what `tensor` splits."""
    step: int


def load(task: Task, path: Path, mesh: Mesh, *, seed: int = 0) -> Loaded:
    """The checkpoint at `path` on a mesh; arguments and errors as of `evaluate_checkpoint`."""
    find_checkpoint(path)  # where there is none, say so before the seconds that a model takes
    if isinstance(task, ChecksWeights):
        task.check_weights(load_meta(path).get("config"))
    model = task.build_model(nnx.Rngs(seed))
    graphdef, params, variables = split_model(model)
    restored = load_params(path, params, variables)
    params = place(restored.eval_params, gathered_shardings(model, mesh))
    return Loaded(model, graphdef, (params, place(restored.variables, replicated(mesh))), restored.step)


def evaluate(
    task: Task,
    model: nnx.Module,
    step: EvalStep,
    mesh: Mesh,
    params: Any,
    variables: Any,
    split: str,
    *,
    max_steps: int | None = None,
) -> dict[str, float]:
    """The numbers of a whole split, in the order of the log; arguments as of `measure`."""
    return summarize(task, split, measure(task, model, step, mesh, params, variables, split, max_steps=max_steps))


def measure(
    task: Task,
    model: nnx.Module,
    step: EvalStep,
    mesh: Mesh,
    params: Any,
    variables: Any,
    split: str,
    *,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """The metrics of a whole split under the given weights. All arguments stay as they are.

    `max_steps`: a tighter limit on the evaluations of a solve than the task's own; traced, so that it never recompiles.
    """
    scalars = StepScalars(max_steps=None if max_steps is None else np.int32(max_steps))
    batches = task.eval_batches(split, local_rows(mesh, task.eval_batch_size))
    params = _gathered(model, params, mesh)
    carry = place(task.fresh_carry(model, task.eval_batch_size), by_batch(mesh))
    totals: Metrics = {}
    pending: Metrics = {}
    bar = tqdm(range(len(batches)), desc=split, unit="batch", leave=False, disable=not (is_first() and sys.stderr.isatty()))
    for i in bar:
        carry, metrics = step(params, variables, put_batch(mesh, batches[i], task.eval_batch_size), carry, scalars)
        totals, pending = merge(totals, fetch(pending)), metrics
    return divide(merge(totals, fetch(pending)))


def evaluate_checkpoint(
    task: Task, path: Path, *, phases: Phases, mesh: MeshOptions, options: EvalOptions, seed: int
) -> Evaluation:
    """Evaluate a checkpoint on valid and test.

    Args:
      task: a task whose model has the shapes of the checkpoint; in everything else the task counts, not the checkpoint.
      path: a run's workdir (the best checkpoint is taken), its checkpoints folder, or the folder of one step.
      phases: phases of the task's model.
      mesh: section `mesh` of the config.
      options: section `eval`.
      seed: seed of the initial parameters, which those of the checkpoint replace.

    Raises:
      UserError: there is no checkpoint, it does not fit, or an option needs an equilibrium that the model does not have.
    """
    solver = phases.evaluation.solver
    options.check(None if solver is None else solver.max_steps)
    devices = make_mesh(mesh)
    check_batch(devices, batch_size=task.batch_size, accumulate=1, eval_batch_size=task.eval_batch_size)
    if options.restarts > 1:
        if not isinstance(task, HasRestarts):
            raise UserError("eval.restarts is for task reasoning: set it to 1")
        task = task.with_restarts(options.restarts)
    model, graphdef, weights, number = load(task, path, devices, seed=seed)
    step = make_eval_step(task, graphdef, devices, replace(phases.evaluation, slots=options.slots))
    at_start = make_eval_step(task, graphdef, devices, phases.evaluation.at_start())
    results = {split: evaluate(task, model, step, devices, *weights, split) for split in SPLITS}
    if options.spectral_radius:
        results["valid"] |= _spectral_radius(task, model, graphdef, devices, solver, *weights)
    sweep = [
        {"split": split, "max_steps": limit}
        | evaluate(task, model, step if limit else at_start, devices, *weights, split, max_steps=limit)
        for limit in options.max_steps_sweep
        for split in SPLITS
    ]
    return Evaluation(step=number, metrics=results, sweep=sweep)


def _spectral_radius(
    task: Task, model: nnx.Module, graphdef: Any, mesh: Mesh, solver: Solver | None, params: Any, variables: Any
) -> dict[str, float]:
    """Mean and maximum of the spectral radius over the first batch of the validation split."""
    if not isinstance(task, HasEquation):
        raise UserError("eval.spectral_radius: this task does not state its equation; set it to False")
    assert solver is not None, "EvalOptions.check has refused it"
    equation = task.equation

    @partial(jax.jit, out_shardings=replicated(mesh))
    def radii(params: Any, variables: Any, batch: Any, carry: Any) -> jax.Array:
        f, z0 = equation(nnx.merge(graphdef, params, variables, copy=True), batch, carry)
        return spectral_radius(f, fixed_point(f, z0, solver=solver).value, jax.random.key(0))

    batches = task.eval_batches("valid", local_rows(mesh, task.eval_batch_size))
    batch = put_batch(mesh, batches[0], task.eval_batch_size)
    carry = place(task.fresh_carry(model, task.eval_batch_size), by_batch(mesh))
    radii_B = np.asarray(radii(params, variables, batch, carry))
    return {"spectral_radius_mean": float(radii_B.mean()), "spectral_radius_max": float(radii_B.max())}


def _gathered(model: nnx.Module, params: Any, mesh: Mesh) -> Any:
    """Parameters whole on every device, but for what `tensor` splits: once, not for every batch."""
    if mesh.shape[FSDP] == 1:
        return params
    return jax.device_put(params, gathered_shardings(model, mesh))


def summarize(task: Task, split: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The task's numbers from divided metrics, then those that the steps add; `forward_unsolved` only where there were some."""
    own = task.summary(split, {name: value for name, value in metrics.items() if name not in STEP_METRICS})
    added = {name: metrics[name] for name in STEP_METRICS if name in metrics}
    return own | {name: value for name, value in added.items() if name != "forward_unsolved" or value > 0}


def fetch(metrics: Metrics) -> Metrics:
    """Metrics on the host, in float64: in float32, a sum that counts pixels would stop at 2^24.

    Call it one batch behind the last one dispatched. A host that never waits fills the device's queue, and several processes on
    CPUs deadlock with full queues: each waits for room, with a program not started that another process waits for.
    """
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(metrics))


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Add the sums and counts of both."""
    return {name: a[name].merge(b[name]) if name in a and name in b else (a | b)[name] for name in a | b}


def divide(metrics: Mapping[str, clu_metrics.Average]) -> dict[str, Any]:
    """Sums over counts; a metric that was never counted is left out. An array, such as a table of counts, stays an array."""
    means = {name: np.asarray(m.total) / float(m.count) for name, m in metrics.items() if m.count > 0}
    return {name: float(mean) if mean.ndim == 0 else mean for name, mean in means.items()}
