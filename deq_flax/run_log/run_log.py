"""What a run tells: `metrics.jsonl`, TensorBoard events, `config.json`, `vocabulary.txt`, pictures, a line on the screen.

A failing disk costs TensorBoard's events, never the run: the first refused write is warned of, training goes on, and lines of
`metrics.jsonl` are kept until the disk takes them.
"""

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore
from tensorboardX.record_writer import RecordWriter

from deq_flax.errors import UserError

_log = logging.getLogger("deq_flax")


class Report:
    """The report of one run, in its workdir.

    Args:
      workdir: created if it is not there.
      resume_step: None for a fresh run, which drops what an earlier one left in `metrics.jsonl`. After resuming from the
        checkpoint of step s: s, which drops the lines of later steps, since they will be written again; a line of step s or
        before must therefore be written before that checkpoint is saved.
      keep: add to a finished run's report, as a separate evaluation does; drops nothing.

    A last line torn by a crash is dropped in any case.

    Raises:
      UserError: the workdir cannot be written to.
    """

    def __init__(self, workdir: str | Path, resume_step: int | None, *, keep: bool = False):
        self._workdir = Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._warned = False
        self._pending = b""
        last = -1 if resume_step is None else resume_step
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            _replace(self._path, _lines_up_to(self._path, math.inf if keep else last))
            self._file = self._path.open("ab", buffering=0)
            self._events = _open_events(self._workdir / "tensorboard", None if keep else last + 1)
        except OSError as error:
            raise UserError(f"cannot write to the workdir {workdir}: {error.strerror or error}") from error

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write_config(self, config: Mapping[str, Any], step: int = 0) -> None:
        """`config.json`, whole or not at all, and the same as text among the TensorBoard events."""
        text = json.dumps(config, indent=2)
        with self._going_on():
            _replace(self._workdir / "config.json", f"{text}\n".encode())
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # a code block to TensorBoard
        self._add_events(step, [summary.text("config", indented)])

    def write_words(self, words: Sequence[str]) -> None:
        """`vocabulary.txt`, one a line, whole or not at all."""
        with self._going_on():
            _replace(self._workdir / "vocabulary.txt", "".join(f"{word}\n" for word in words).encode())

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Adds one line `{"step": step, "split": split, ...}` and its events.

        Args:
          step: updates done so far.
          split: 'train', 'valid' or 'test'.
          metrics: numbers, or arrays of one element. Seven significant digits are kept; NaN and infinities become null.
        """
        numbers = {name: _number(value) for name, value in metrics.items()}
        line = json.dumps({"step": int(step), "split": split} | {name: _rounded(x) for name, x in numbers.items()})
        self._pending += f"{line}\n".encode()
        self.complete()
        self._add_events(step, [summary.scalar(f"{split}/{name}", float(x)) for name, x in numbers.items()])

    def complete(self) -> bool:
        """Whether all lines are on disk; those it refused are tried again first."""
        with self._going_on():
            self._append(self._pending)
            self._pending = b""
        return len(self._pending) == 0

    def line(self, step: int, steps: int, metrics: Mapping[str, Any], split: str = "train") -> None:
        """Prints one line of progress; arguments as for `write` and `progress_line`."""
        with self._going_on():
            print(progress_line(step, steps, metrics, split), flush=True)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """`pictures/NAME-STEP.png`, (H, W, 3) uint8, and its event."""
        folder = self._workdir / "pictures"
        with self._going_on():
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / f"{name}-{step:07}.png")
        self._add_events(step, [summary.image(name, picture, dataformats="HWC")])

    def close(self) -> None:
        """Closes the files."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()

    def _append(self, lines: bytes) -> None:
        whole = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(lines) != len(lines):
                raise OSError("the disk took only a part of a line")
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), whole)
            raise

    def _add_events(self, step: int, values: list) -> None:
        with self._going_on():
            for value in values:
                self._events.write(Event(wall_time=time.time(), step=int(step), summary=value).SerializeToString())
            self._events.flush()

    @contextlib.contextmanager
    def _going_on(self) -> Generator[None]:
        """Turns failed writes into one warning a run."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                _log.warning("cannot write to %s: %s; the run goes on", self._workdir, error.strerror or error)
            self._warned = True


class NoReport(Report):
    """What every process but the first reports: nothing."""

    def __init__(self):
        pass

    def close(self) -> None:
        pass

    def write_config(self, config: Mapping[str, Any], step: int = 0) -> None:
        pass

    def write_words(self, words: Sequence[str]) -> None:
        pass

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        pass

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        pass

    def complete(self) -> bool:
        return True

    def line(self, step: int, steps: int, metrics: Mapping[str, Any], split: str = "train") -> None:
        pass


class Clock:
    """Seconds spent training: what happens within `pause` (evaluation, checkpoints, compilation) does not count."""

    def __init__(self):
        self._paused = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Generator[None]:
        """Stops the clock for the length of a `with` block. Wait for the device first, or its queue is not counted either."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def lap(self) -> float:
        """Seconds since the last lap, or since the beginning, pauses left out; never 0."""
        now = time.perf_counter()
        seconds = now - self._since - self._paused
        self._since, self._paused = now, 0.0
        return max(seconds, 1e-9)


_FIELDS = (
    ("loss {}", ("loss", "{:.3f}")),
    ("ppl {}", ("ppl", "{:.4g}")),
    ("accuracy {}", ("accuracy", "{:.2%}")),
    ("miou {}", ("miou", "{:.2%}")),
    ("fwd {} evals {}", ("forward_nfe", "{:.1f}"), ("forward_residual", "{:.1e}")),
    ("bwd {} evals {}", ("backward_nfe", "{:.1f}"), ("backward_residual", "{:.1e}")),
    ("jac {}", ("jacobian_loss", "{:.3g}")),
    ("grad {}", ("grad_norm", "{:.2g}")),
    ("lr {}", ("learning_rate", "{:.1e}")),
)
"""Each part of the line, with the metrics and formats it needs; a part of which any is missing is left out."""


def progress_line(step: int, steps: int, metrics: Mapping[str, Any], split: str = "train") -> str:
    """One line for a person: `step 120/600  loss 4.213  ppl 67.5  fwd 17.2 evals 6.1e-04 ...  21.3k tok/s  ETA 1m05s`.

    Args:
      step, steps: updates done, and to do in all.
      metrics: as in `metrics.jsonl`; missing ones are left out.
      split: named in front unless 'train'.
    """
    parts = [f"{'' if split == 'train' else split + ' '}step {step:>{len(str(steps))}}/{steps}"]
    for text, *needs in _FIELDS:
        if all(metrics.get(name) is not None for name, _ in needs):
            parts.append(text.format(*(form.format(_number(metrics[name])) for name, form in needs)))
    for name, unit in (("tokens_per_second", "tok/s"), ("examples_per_second", "ex/s")):
        if metrics.get(name) is not None:
            parts.append(f"{_short(_number(metrics[name]))} {unit}")
    rate = metrics.get("steps_per_second")
    if rate is not None and _number(rate) > 0:
        parts.append(f"ETA {_duration((steps - step) / _number(rate))}")
    return "  ".join(parts)


def _short(x: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _number(value: Any) -> int | float:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def _rounded(value: int | float) -> int | float | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _lines_up_to(path: Path, last_step: float) -> bytes:
    """The whole lines of a metrics file whose step is not above `last_step`."""
    if not path.exists():
        return b""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
            if line.endswith(b"\n") and json.loads(line)["step"] <= last_step:
                kept.append(line)
    return b"".join(kept)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment it has the old content or the new."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _open_events(folder: Path, purge_step: int | None) -> RecordWriter:
    """An event file of our own, flushed by us: tensorboardX's SummaryWriter hangs once a full disk ends its thread."""
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()  # not seconds: two files opened within one would be the same
    events = RecordWriter(str(folder / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}.{os.getpid()}"))
    events.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    if purge_step is not None:  # TensorBoard then hides earlier events of this step and later
        events.write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)).SerializeToString())
    events.flush()
    return events
