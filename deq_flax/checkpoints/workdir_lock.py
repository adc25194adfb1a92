"""The lock of a workdir: one run at a time writes there. Reading, as evaluations and plots do, needs no lock.

`DIR/run.lock` names the process that holds it. On the same machine a holder that has died is known by its process id and start
time. From another machine that shares the disk only its beat can be seen, the file's time, which the holder renews: a process
that finds the lock watches it for a few beats, so that the clocks of two machines are never compared.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from deq_flax.errors import UserError
from deq_flax.untrusted.files import parse_json

BEAT = 15.0
"""Seconds between two signs of life of a holder."""
PATIENCE = 60.0
"""Seconds without a sign of life, watched from another machine, after which a holder counts as dead."""

_log = logging.getLogger("deq_flax")


class _Seen(NamedTuple):
    """A lock file at one moment."""

    text: str
    beat: int
    """Time at which the file was last modified, in ns."""

    @property
    def holder(self) -> dict[str, Any]:
        """The holder's description of itself; empty while it is being written, or if the disk was full."""
        with contextlib.suppress(ValueError):
            found = parse_json(self.text)
            if isinstance(found, dict):
                return found
        return {}

    def __str__(self) -> str:
        holder = self.holder
        return (
            f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')} since {holder.get('since', '?')}"
        )


class WorkdirLock:
    """Hold the lock of a workdir for the length of a `with` block. The folder is created, and removed again if it stays empty.

    Args:
      workdir: the folder.

    Raises:
      UserError: another process holds the lock, or the folder cannot be written to.
    """

    def __init__(self, workdir: str | Path):
        self._workdir = Path(workdir)
        self._path = self._workdir / "run.lock"
        self._made: list[Path] = []
        self._released = threading.Event()
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "machine": _machine()}
        self._text = json.dumps(who | {"started": _start_of(os.getpid()), "token": uuid.uuid4().hex}) + "\n"

    def __enter__(self) -> "WorkdirLock":
        try:
            self._make_folder()
            while not self._create():
                seen = _read(self._path)
                if seen is not None and self._is_stale(seen) and self._take_over(seen):
                    break
        except OSError as error:
            self._remove_made()
            raise UserError(f"cannot write to the workdir {self._workdir}: {error.strerror or error}") from error
        threading.Thread(target=self._beat, name="workdir lock", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._released.set()
        with contextlib.suppress(OSError):
            seen = _read(self._path)
            if seen is not None and seen.text == self._text:
                self._path.unlink(missing_ok=True)
        self._remove_made()

    def check(self) -> None:
        """Raise UserError if another process has taken the lock over, as it may from a machine that seemed dead."""
        try:
            seen = _read(self._path)
        except OSError:  # a disk that refuses for a while
            return
        if seen is not None and seen.text != self._text:
            raise UserError(
                f"{self._workdir} was taken over by {seen}, because this process had given no sign of life: it ends"
            )

    def _make_folder(self) -> None:
        for folder in reversed((self._workdir, *self._workdir.parents)):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                self._made.append(folder)

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # it is in use now
                folder.rmdir()

    def _create(self) -> bool:
        """Create the lock; returns False if there is one."""
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, self._text.encode())
            os.fsync(file)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)
        return True

    def _is_stale(self, seen: _Seen) -> bool:
        """Return True if the holder has died, False if the lock has changed. UserError: the holder is alive."""
        holder = seen.holder
        if holder.get("machine") == _machine():
            if _is_alive(holder.get("pid"), holder.get("started")):
                raise self._in_use(seen)
            _log.warning("taking over %s from %s, which no longer exists", self._workdir, seen)
            return True
        _log.warning("%s is locked by %s: watching for %.0f s whether it is alive", self._workdir, seen, PATIENCE)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(0.5, PATIENCE / 10))
            now = _read(self._path)
            if now is None or now.text != seen.text:
                return False
            if now.beat != seen.beat:
                raise self._in_use(seen)
        _log.warning("taking over %s from %s, which has given no sign of life", self._workdir, seen)
        return True

    def _in_use(self, seen: _Seen) -> UserError:
        return UserError(f"{self._workdir} is in use by {seen}: wait for it, stop it, or choose another --workdir")

    def _take_over(self, stale: _Seen) -> bool:
        """Replace a stale lock by this one. Returns False if another process has been faster.

        Of several processes that find the same stale lock, only the one that creates its mark replaces it.
        """
        name = self._path.name
        mark = self._path.with_name(f".{name}.{hashlib.sha256(stale.text.encode()).hexdigest()[:16]}")
        try:
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            end = time.monotonic() + PATIENCE
            while mark.exists() and time.monotonic() < end:
                time.sleep(min(0.05, PATIENCE / 10))
            mark.unlink(missing_ok=True)  # left by a process that died before it had replaced the lock
            return False
        try:
            seen = _read(self._path)
            if seen is None or seen.text != stale.text:
                return False
            own = self._path.with_name(f".{name}.{uuid.uuid4().hex}")
            own.write_text(self._text)
            own.replace(self._path)
            return True
        finally:
            mark.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                seen = _read(self._path)
                if seen is None:  # somebody has deleted it
                    self._create()
                elif seen.text == self._text:
                    os.utime(self._path)


def _read(path: Path) -> _Seen | None:
    """The lock file; None if there is none. It is opened anew each time, which makes network disks look at the server.

    OSError: it cannot be read, or is a link, a pipe or a folder.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, f"{path.name} is not an ordinary file")
        with path.open(encoding="utf-8", errors="replace") as file:
            return _Seen(file.read(4096), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _machine() -> str:
    """The name of the place where process ids are unique: this boot of this machine, and the container's namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: Any, started: Any) -> bool:
    """Return True if a process of this machine has this id and started at this time."""
    if not (isinstance(pid, int) and 0 < pid < 2**31):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    now = _start_of(pid)
    return not now or now == started


def _start_of(pid: int) -> str:
    """The start time of a process of this machine, in the system's unit; '' if it is not known, 'ended' for a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if state == "Z" else fields[18]
