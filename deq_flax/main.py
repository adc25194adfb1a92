"""Train or evaluate a model.

  python -m deq_flax.main --config configs/wt103.py:tiny --workdir runs/tiny
  python -m deq_flax.main --config configs/ptb.py --workdir runs/ptb --config.data.path=DIR --config.train.steps=20000
  python -m deq_flax.main --config configs/wt103.py:tiny --workdir runs/tiny --mode eval

The same command again continues an unfinished run from its last checkpoint. Several processes, on one machine or many, are one
run when each is given the same --coordinator; see launch/.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from deq_flax import cli
from deq_flax.config import Config, flattened, from_stored, make_task, phases_of, to_dict
from deq_flax.devices.processes import distributed, is_first, print_once
from deq_flax.errors import UserError
from deq_flax.task import Task
from deq_flax.train.evaluate import evaluate_checkpoint
from deq_flax.train.loop import train

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics.jsonl, config.json, tensorboard")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or eval: evaluate the best checkpoint")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "with --mode eval: a workdir or checkpoint other than this workdir's best"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "for several processes: HOST:PORT of the first, or 'auto' under Slurm, Open MPI, on TPU or a JobSet"
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator HOST:PORT: the number of processes")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator HOST:PORT: the index of this process, from 0")

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


def main() -> int:
    """Run the command; returns its exit code."""
    config, workdir = cli.resolved(), Path(_WORKDIR.value or "")
    cli.require(
        _MODE.value == "eval" or _CHECKPOINT.value is None,
        "--checkpoint goes with --mode eval; to train from weights: --config.checkpoint.init_from=DIR",
    )
    with distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
        task = make_task(config)
        # Options that were left to the data are known now; the record of the run holds them.
        config = dataclasses.replace(config, model=task.model_options)
        return _evaluate(task, config, workdir) if _MODE.value == "eval" else _train(task, config, workdir)


def _train(task: Task, config: Config, workdir: Path) -> int:
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
        return 0
    if result.resumed:
        print_once(f"this run is complete ({config.train.steps} steps); its best checkpoint once more:")
    print_once(_summary("done", result.step, result.metrics))
    return 0


def _evaluate(task: Task, config: Config, workdir: Path) -> int:
    path = Path(_CHECKPOINT.value) if _CHECKPOINT.value else workdir
    result = evaluate_checkpoint(
        task, path, phases=phases_of(config), mesh=config.mesh, options=config.eval, seed=config.train.seed
    )
    if result.anytime and is_first():
        _write_lines(workdir / "anytime.jsonl", map(json.dumps, result.anytime))
        print(_table(result.anytime))
    print_once(_summary("evaluated", result.step, result.metrics))
    return 0


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


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
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        stored = from_stored(json.loads(path.read_text()), vocab_size=config["model"].get("vocab_size", 0))
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"cannot read {path}: {error}; choose another --workdir") from error
    old, new = dict(flattened(to_dict(stored))), dict(flattened(config))
    differing = [
        key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        print(_table([{"key": key, "there": old.get(key, "-"), "here": new.get(key, "-")} for key in differing]))
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{workdir} holds a run of another config, which differs in {', '.join(differing[:3])}{more}: choose another "
            "--workdir, or start from its weights with --config.checkpoint.init_from"
        )


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
