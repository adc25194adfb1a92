"""Run logging: `metrics.jsonl`, TensorBoard events, `config.json`, the vocabulary, pictures, and progress on the terminal.

A disk that refuses writes does not end the run. The first refusal is logged; lines of `metrics.jsonl` are kept in memory until
the disk takes them, TensorBoard events and pictures are dropped.
"""

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore
from tensorboardX.record_writer import RecordWriter

from deq_flax.devices.processes import print_once
from deq_flax.errors import UserError
from deq_flax.run_log.metrics_file import lines_up_to
from deq_flax.run_log.progress import progress_line, rounded, to_number
from deq_flax.run_log.results import replace_file

_log = logging.getLogger("deq_flax")


class RunLog:
    """The log of one run, in its workdir.

    Args:
      workdir: created if it does not exist.
      resume_step: None for a new run, which deletes the lines that an earlier one left in `metrics.jsonl`. For a run resumed
        from the checkpoint of step s: s, which deletes the lines of later steps, since they will be written again. So a line of
        step s or before must be on disk before that checkpoint is saved (see `flush`).

    A last line that a crash left incomplete is deleted in any case.

    Raises:
      UserError: the workdir cannot be written to.
    """

    def __init__(self, workdir: str | Path, resume_step: int | None):
        self._workdir = Path(workdir)
        self._path = self._workdir / "metrics.jsonl"
        self._warned = False
        self._in_line = False
        self._pending = b""
        last = -1 if resume_step is None else resume_step
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, lines_up_to(self._path, last))
            self._file = self._path.open("ab", buffering=0)
            self._events = _open_events(self._workdir / "tensorboard", last + 1)
        except OSError as error:
            raise UserError(f"cannot write to the workdir {workdir}: {error.strerror or error}") from error

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def write_config(self, config: Mapping[str, Any], step: int = 0) -> None:
        """Write `config.json`, completely or not at all, and the same as text to TensorBoard."""
        text = json.dumps(config, indent=2)
        with self._tolerating_disk_errors():
            replace_file(self._workdir / "config.json", f"{text}\n".encode())
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # a code block to TensorBoard
        self._add_events(step, [summary.text("config", indented)])

    def write_text(self, name: str, content: str) -> None:
        """Write the file `name`, such as vocabulary.txt, completely or not at all."""
        with self._tolerating_disk_errors():
            replace_file(self._workdir / name, content.encode())

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Append a line `{"step": step, "split": split, ...}` to `metrics.jsonl`, and the same to TensorBoard.

        Args:
          step: updates done so far.
          split: 'train', 'valid' or 'test'.
          metrics: numbers, or arrays of one element. Seven significant digits are kept; NaN and infinities become null.
        """
        numbers = {name: to_number(value) for name, value in metrics.items()}
        line = json.dumps({"step": int(step), "split": split} | {name: rounded(x) for name, x in numbers.items()})
        self._pending += f"{line}\n".encode()
        self.flush()
        self._add_events(step, [summary.scalar(f"{split}/{name}", float(x)) for name, x in numbers.items()])

    def flush(self) -> bool:
        """Try again to write the lines that the disk has refused. Returns True if all lines are on disk."""
        with self._tolerating_disk_errors():
            self._append(self._pending)
            self._pending = b""
        return len(self._pending) == 0

    def print_progress(self, step: int, steps: int, metrics: Mapping[str, Any], split: str = "train") -> None:
        """Print a `progress_line`; arguments as there. On a terminal those of training are one line, written over each time."""
        line = progress_line(step, steps, metrics, split)
        if split != "train" or not sys.stdout.isatty():
            return self.print(line)
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be written over
        print_once(f"\r\x1b[K{line[:width]}", end="")
        self._in_line = True

    def print(self, text: str) -> None:
        """Print a line."""
        self.end_line()
        print_once(text)

    def end_line(self) -> None:
        """Leave the line that is written over as it is, before anything else is printed."""
        if self._in_line:
            print_once("")
        self._in_line = False

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Write a picture, (H, W, 3) uint8, to `pictures/NAME-STEP.png` and to TensorBoard."""
        folder = self._workdir / "pictures"
        with self._tolerating_disk_errors():
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / f"{name}-{step:07}.png")
        self._add_events(step, [summary.image(name, picture, dataformats="HWC")])

    def close(self) -> None:
        """Close the files."""
        self.end_line()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()

    def _append(self, lines: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(lines) != len(lines):
                raise OSError("the disk took only a part of a line")
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
            raise

    def _add_events(self, step: int, values: list) -> None:
        with self._tolerating_disk_errors():
            for value in values:
                self._events.write(Event(wall_time=time.time(), step=int(step), summary=value).SerializeToString())
            self._events.flush()

    @contextlib.contextmanager
    def _tolerating_disk_errors(self) -> Generator[None]:
        """Log the first failed write of a run, and continue after any."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                _log.warning("cannot write to %s: %s; training continues", self._workdir, error.strerror or error)
            self._warned = True


class SilentRunLog(RunLog):
    """A log that writes and prints nothing, for every process but the first."""

    def __init__(self):
        pass

    def write_config(self, config: Mapping[str, Any], step: int = 0) -> None:
        pass

    def write_text(self, name: str, content: str) -> None:
        pass

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> bool:
        return True

    def print_progress(self, step: int, steps: int, metrics: Mapping[str, Any], split: str = "train") -> None:
        pass

    def print(self, text: str) -> None:
        pass

    def end_line(self) -> None:
        pass

    def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def _open_events(folder: Path, purge_step: int) -> RecordWriter:
    """An event file that we flush ourselves: tensorboardX's SummaryWriter hangs once a full disk has ended its thread.

    TensorBoard hides events of `purge_step` and later in earlier files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()  # in seconds, two files opened within one would have the same name
    events = RecordWriter(str(folder / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}.{os.getpid()}"))
    events.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    events.write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)).SerializeToString())
    events.flush()
    return events
