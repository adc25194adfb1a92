"""Results for programs to read: strict JSON, files that are written whole, `eval.json`."""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def to_json(value: Any, *, indent: int | None = None) -> str:
    """A nested value as JSON that every reader takes: all digits of numbers, null for NaN and infinities."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it has the old content or the new. OSError: the disk refused."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def write_evaluation(workdir: Path, evaluation: Mapping[str, Any]) -> None:
    """Write `eval.json`, the last evaluation of a checkpoint.

    Args:
      workdir: created if it does not exist.
      evaluation: JSON with `step`, `metrics`, the numbers by split, and `sweep`, rows with `split` and `max_steps`.

    Raises:
      OSError: the disk refused.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    replace_file(workdir / "eval.json", f"{to_json(evaluation, indent=2)}\n".encode())


def append_evaluation(workdir: Path, evaluation: Mapping[str, Any]) -> None:
    """Append the rows of an evaluation to `metrics.jsonl`; `"mode": "eval"` tells them from the lines of training.

    Arguments and errors as for `write_evaluation`. A run that is in progress may append its own lines at the same time.
    """
    rows: Sequence[Mapping[str, Any]] = [{"split": split} | values for split, values in evaluation["metrics"].items()]
    head = {"step": evaluation["step"], "split": "", "mode": "eval"}
    lines = [to_json(head | row) for row in [*rows, *evaluation["sweep"]]]
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "metrics.jsonl").open("ab", buffering=0) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _strict(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
