"""Train or evaluate a model.

  python -m deq_flax.main --config wt103:tiny --workdir runs/tiny
  python -m deq_flax.main --config ptb --workdir runs/ptb --config.data.path=DIR --config.train.steps=20000
  python -m deq_flax.main --mode eval --workdir runs/tiny [--config.section.key=value ...]

Without --config, the run's own is taken, the config.json in its workdir. The same command again continues an unfinished run
from its last checkpoint. Results are in metrics.jsonl and, for the best checkpoint, eval.json. Several processes are one run if
each is given the same --coordinator; see launch/.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from deq_flax import cli
from deq_flax.config import Config, flattened, make_task, phases_of, read_run_config, to_dict
from deq_flax.config_files import run_config
from deq_flax.devices.processes import PATIENCE, distributed, is_first, print_once
from deq_flax.errors import UserError
from deq_flax.run_log.results import append_evaluation, write_evaluation
from deq_flax.task import Task
from deq_flax.train.evaluate import Evaluation, evaluate_checkpoint
from deq_flax.train.loop import train
from deq_flax.untrusted.files import shown

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run: checkpoints, config.json, metrics.jsonl, eval.json, tensorboard"
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or eval: evaluate the best checkpoint")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "with --mode eval: a workdir or checkpoint other than this workdir's best"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "for several processes: HOST:PORT of the first, or 'auto' under Slurm, Open MPI, on TPU or a JobSet"
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator HOST:PORT: the number of processes")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator HOST:PORT: the index of this process, from 0")
_PATIENCE = flags.DEFINE_integer(
    "patience",
    PATIENCE,
    "with --coordinator: seconds to wait for the other processes, at the start and for signs of life",
)

_log = logging.getLogger("deq_flax")

MAY_CHANGE = (
    "eval.",
    "deq.eval_",
    "data.path",
    "data.cache",
    "data.max_damaged",
    "data.pictures",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "mesh.",
    "checkpoint.",
)
"""Keys that may change when a run is resumed: they decide where data lies, what is logged and kept, and the devices, not
what is learned (but for rounding on another mesh)."""


def main() -> Mapping[str, Any] | None:
    """Run the command; returns its result in the first process."""
    config, workdir = cli.resolved(), Path(_WORKDIR.value or "")
    cli.require(
        _MODE.value == "eval" or _CHECKPOINT.value is None,
        "--checkpoint goes with --mode eval; to train from weights: --config.checkpoint.init_from=DIR",
    )
    with distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, patience=_PATIENCE.value):
        task = make_task(config)
        # Options that were left to the data are known now; the record of the run holds them.
        config = dataclasses.replace(config, model=task.model_options)
        result = _evaluate(task, config, workdir) if _MODE.value == "eval" else _train(task, config, workdir)
        return result if is_first() else None


def _train(task: Task, config: Config, workdir: Path) -> Mapping[str, Any]:
    record = to_dict(config)
    _refuse_another_config(record, workdir)
    result = train(
        task,
        workdir=workdir,
        config=record,
        phases=phases_of(config),
        optimizer=config.optimizer,
        train=config.train,
        mesh=config.mesh,
        checkpoint=config.checkpoint,
    )
    if result.interrupted:
        return {"workdir": str(workdir), "interrupted": True, "step": result.step}
    if result.resumed:
        print_once(f"this run is complete ({config.train.steps} steps); its best checkpoint once more:")
    evaluation = _described(workdir, Evaluation(step=result.step, metrics=result.metrics, sweep=[]), config)
    _keep(evaluation, workdir, write_evaluation)
    print_once(_summary("done", result.step, result.metrics))
    return {"workdir": str(workdir), "interrupted": False} | evaluation


def _evaluate(task: Task, config: Config, workdir: Path) -> Mapping[str, Any]:
    path = Path(_CHECKPOINT.value) if _CHECKPOINT.value else workdir
    result = evaluate_checkpoint(
        task, path, phases=phases_of(config), mesh=config.mesh, options=config.eval, seed=config.train.seed
    )
    evaluation = _described(path, result, config)
    _keep(evaluation, workdir, write_evaluation, append_evaluation)
    if result.sweep:
        print_once(_table(result.sweep))
    print_once(_summary("evaluated", result.step, result.metrics))
    return evaluation


def _described(checkpoint: Path, result: Evaluation, config: Config) -> dict[str, Any]:
    """An evaluation as `eval.json` holds it: all digits, and the limits that it was made under."""
    deq = config.deq
    limits = None if deq is None else {"max_steps": deq.evaluation_solver().max_steps, "tol": deq.tol, "stop": deq.stop}
    return {
        "checkpoint": str(checkpoint),
        "step": result.step,
        "metrics": result.metrics,
        "limits": limits,
        "sweep": result.sweep,
        "config": to_dict(config),
    }


def _keep(evaluation: Mapping[str, Any], workdir: Path, *writers: Callable[[Path, Mapping[str, Any]], None]) -> None:
    """Write an evaluation, in the first process. Where the disk refuses, warn rather than lose the result."""
    if not is_first():
        return
    try:
        for write in writers:
            write(workdir, evaluation)
    except OSError as error:
        _log.warning("cannot write the evaluation to %s: %s", workdir, error.strerror or error)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows aligned under their keys; a cell is empty where a row lacks a key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _summary(head: str, step: int, metrics: Mapping[str, Mapping[str, float]]) -> str:
    """The one-line result."""
    parts = [f"{head}: best checkpoint, step {step}"]
    for split, values in metrics.items():
        parts.append(f"{split} " + " ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return " | ".join(parts)


def _refuse_another_config(config: Mapping[str, Any], workdir: Path) -> None:
    """Raise UserError if the workdir holds a run of another config: continuing it would give the result of neither."""
    if not (workdir / "config.json").exists():
        return
    try:
        stored = read_run_config(workdir)
    except UserError as error:
        raise UserError(f"{error}; choose another --workdir") from error
    old, new = dict(flattened(to_dict(stored))), dict(flattened(config))
    if old.get("model.vocab_size") == 0:  # written before 0.1.0, which left it to the text
        old["model.vocab_size"] = new.get("model.vocab_size", 0)
    differing = [
        key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        named = [f"{key} ({_shown(old, key)} there, {_shown(new, key)} here)" for key in differing[:3]]
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{workdir} holds a run of another config, which differs in {', '.join(named)}{more}: choose another "
            "--workdir, or start from its weights with --config.checkpoint.init_from"
        )


def _shown(values: Mapping[str, Any], key: str) -> str:
    return shown(repr(values[key])) if key in values else "no value"


if __name__ == "__main__":
    cli.run(main, required=("workdir",), of_run=("workdir", run_config))
