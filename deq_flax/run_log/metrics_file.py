"""The lines of metrics.jsonl, read back: to continue a run, and to plot it."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deq_flax.errors import UserError
from deq_flax.untrusted.files import MAX_INTEGER, check_regular, parse_json

Lines = Sequence[Mapping[str, Any]]

MAX_LINE = 1 << 20
"""Largest size of a line in bytes."""


def read_metrics(workdir: Path) -> Lines:
    """The lines of a run's metrics.jsonl: those of training and, from evaluations since, those of the test split.

    An incomplete last line is left out.

    Raises:
      UserError: there are none, or one is damaged.
    """
    path = workdir / "metrics.jsonl"
    lines = []
    try:
        check_regular(path)
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
                if line.endswith(b"\n") or len(line) == MAX_LINE:
                    entry = _parsed(line, number, path)
                    if entry.get("mode") != "eval" or (entry["split"] == "test" and "max_steps" not in entry):
                        lines.append(entry)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; is {workdir} a run's folder?") from error
    if not lines:
        raise UserError(f"{path} holds no metrics yet: train for at least train.log_every steps")
    return lines


def lines_up_to(path: Path, last_step: int) -> bytes:
    """The complete lines of a metrics file whose step is at most `last_step`; lines that are no metrics are left out.

    Raises:
      OSError: the file cannot be read.
    """
    if not path.exists():
        return b""
    check_regular(path)
    kept = []
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(MAX_LINE), b""):
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    if _entry(line)["step"] <= last_step:
                        kept.append(line)
    return b"".join(kept)


def _parsed(line: bytes, number: int, path: Path) -> Mapping[str, Any]:
    try:
        return _entry(line)
    except ValueError as error:
        raise UserError(
            f"{path} line {number} is no line of metrics: delete it, or the run's report was overwritten"
        ) from error


def _entry(line: bytes) -> dict[str, Any]:
    """The content of a line. ValueError: it is no line of metrics."""
    entry = parse_json(line)
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or not isinstance(entry.get("split"), str):
        raise ValueError("no step or no split")
    if not 0 <= entry["step"] < MAX_INTEGER or not isinstance(entry.get("mode", ""), str):
        raise ValueError("a step out of range, or a strange mode")
    for name, value in entry.items():
        if name not in ("step", "split", "mode") and not (value is None or _is_number(value)):
            raise ValueError(f"{name} is no number")
    return entry


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < MAX_INTEGER
    return type(value) is float and math.isfinite(value)
