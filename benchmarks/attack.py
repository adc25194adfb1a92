"""Hostile files of every kind against the code that reads them: no traceback, no hang, no flood, and nothing started.

    python -m benchmarks.attack [--rooms weights,images] [--only TEXT] [--every N] [--seed 0] [--write]

Every file is read as the commands read it, in a process that is watched: it may take 10 seconds of its processor's time, 1 GB
of memory besides the size of the file, and a message of one line and 1,000 characters; it may start no process, open no socket
and write only below the folder of its case. Whatever else happens is listed. Nothing hostile leaves a temporary folder. The
room `commands` runs whole commands, which are not watched: it judges their exit code, their output, their files and their time.
"""

import argparse
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.hostile import Case, SilentlyWrongError

ROOT = Path(__file__).parent.parent
ROOMS = ("weights", "images", "datasets", "checkpoints", "workdirs", "commands")
SECONDS = 10
PATIENCE = 20
"""Seconds after which a process is ended, busy or not."""
SLOW = 400
"""Seconds after which a whole command is ended."""
BYTES = 1 << 30
CEILING = 4 << 30
"""Bytes after which an allocation fails, so that the attack does not take the whole machine."""
LENGTH = 1000
BROKEN = 70
"""The exit code of a worker whose attack itself has failed."""
OUTCOMES = ("read", "refused", "traceback", "hang", "flood", "crash", "escape", "silently wrong")
GOOD = ("read", "refused")


def all_cases(room: str, seed: int) -> Iterator[Case]:
    """The cases of a room, the same ones in the same order for the same seed."""
    import numpy as np

    yield from importlib.import_module(f"benchmarks.hostile.{room}").cases(np.random.default_rng(seed))


# The process that reads the files.


class Watch:
    """What a case may not do: a process started, a socket opened, a file written outside of `folder`."""

    def __init__(self, folder: Path):
        self._allowed = (str(folder), "/dev/null")
        self.events: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.spawn",
            "os.fork",
            "os.forkpty",
            "pty.spawn",
        ):
            self._found(f"{event} {arguments[:2]}")
        elif event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
            self._found(f"{event} {arguments[1:]}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.abspath(path).startswith(self._allowed):
                self._found(f"write to {path}")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod"):
            place = arguments[1] if event in ("os.symlink", "os.link") else arguments[0]
            path = os.fsdecode(place) if isinstance(place, str | bytes) else ""
            if isinstance(arguments[-1], int) and arguments[-1] >= 0 and not os.path.isabs(path):
                return  # within a folder that is being deleted
            if path and not os.path.abspath(path).startswith(self._allowed):
                self._found(f"{event} {path}")

    def _found(self, what: str) -> None:
        self.events.append(what[:200])
        raise PermissionError(f"the attack watches: {what[:200]}")


def work(room: str, numbers: list[int], seed: int, folder: Path) -> None:
    """Read the cases of these numbers, printing a line of JSON before and after each."""
    import faulthandler
    import warnings

    from deq_flax.errors import UserError

    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "MPLCONFIGDIR": str(folder / "matplotlib")}
    if room == "workdirs":
        import matplotlib.font_manager  # noqa: F401  its first import starts programs to list the fonts
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (CEILING, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    watch, wanted = Watch(folder), set(numbers)
    for number, case in enumerate(itertools.islice(all_cases(room, seed), max(numbers) + 1)):
        if number not in wanted:
            continue
        here = folder / str(number)
        here.mkdir(parents=True)
        print(json.dumps({"number": number, "kind": case.kind, "name": case.name}), file=report, flush=True)
        try:
            path = case.make(here)
        except Exception:
            traceback.print_exc()
            os._exit(BROKEN)
        size = sum(file.stat().st_blocks * 512 for file in here.rglob("*") if file.is_file() and not file.is_symlink())
        print(json.dumps({"made": number}), file=report, flush=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        before, start, watch.events = _memory("VmRSS"), time.process_time(), []
        watch.on = room != "commands"
        try:
            case.read(path)
            outcome, said = "read", ""
        except UserError as error:
            outcome, said = "refused", str(error)
            if "\n" in said:
                outcome = "traceback"
        except SilentlyWrongError as error:
            outcome, said = "silently wrong", str(error)
        except BaseException as error:
            outcome, said = "traceback", f"{type(error).__name__}: {error}"
        watch.on = False
        seconds, grown = time.process_time() - start, _memory("VmHWM") - before
        if watch.events:
            outcome, said = "escape", watch.events[0]
        elif outcome in GOOD and (grown > BYTES + size or len(said) > LENGTH):
            outcome, said = "flood", f"{grown >> 20} MB, {len(said)} characters: {said}"
        elif outcome in GOOD and seconds > SECONDS:
            outcome = "hang"
        result = {"outcome": outcome, "said": said[:300], "seconds": round(seconds, 2), "megabytes": grown >> 20}
        print(json.dumps(result), file=report, flush=True)
        shutil.rmtree(here, ignore_errors=True)


def _memory(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


# The process that watches.


def attack(room: str, numbers: list[int], seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The result of every case; a process that hangs is ended, and one that crashes is replaced."""
    left = list(numbers)
    while left:
        here = folder / f"{room}-{left[0]}"
        command = [sys.executable, "-m", "benchmarks.attack", "--worker", room, "--numbers", ",".join(map(str, left))]
        with (folder / "stderr").open("w") as errors:
            worker = subprocess.Popen(
                [*command, "--seed", str(seed), "--folder", str(here)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        before = len(left)
        for result in _results(worker, PATIENCE if room != "commands" else SLOW, folder / "stderr"):
            left.remove(result["number"])
            yield result
        shutil.rmtree(here, ignore_errors=True)
        if worker.returncode == BROKEN or len(left) == before:
            raise SystemExit((folder / "stderr").read_text(errors="replace"))


def _results(worker: subprocess.Popen, patience: int, errors: Path) -> Iterator[dict[str, Any]]:
    """The results that a worker reports, and that of the case in which it ended."""
    case: dict[str, Any] = {}
    timer, hung = threading.Timer(0, lambda: None), threading.Event()

    def end() -> None:
        hung.set()
        os.killpg(worker.pid, signal.SIGKILL)

    assert worker.stdout is not None
    with worker:
        try:
            for line in worker.stdout:
                message = json.loads(line)
                if "kind" in message:
                    case = message
                elif "made" in message:
                    timer = threading.Timer(patience, end)
                    timer.start()
                else:
                    timer.cancel()
                    yield case | message
                    case = {}
        finally:
            timer.cancel()
            if worker.poll() is None and case:
                os.killpg(worker.pid, signal.SIGKILL)
    if case and worker.returncode != BROKEN:
        outcome, tail = "hang" if hung.is_set() else "crash", errors.read_text(errors="replace").strip()[-300:]
        said = f"exit code {worker.returncode}: {tail}"
        yield case | {"outcome": outcome, "said": said, "seconds": patience, "megabytes": 0}


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--rooms", default=",".join(ROOMS), help=f"rooms to try, of {', '.join(ROOMS)}")
    parser.add_argument("--only", default="", help="only cases whose class or name contains this")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th case")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random damage")
    parser.add_argument("--verbose", action="store_true", help="list every case, not the findings alone")
    for hidden in ("--worker", "--numbers", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments.worker, [*map(int, arguments.numbers.split(","))], arguments.seed, Path(arguments.folder))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        for room in arguments.rooms.split(","):
            chosen = [
                i for i, case in enumerate(all_cases(room, arguments.seed)) if arguments.only in f"{case.kind}: {case.name}"
            ]
            for result in attack(room, chosen[:: arguments.every], arguments.seed, Path(folder)):
                counts[result["kind"]][result["outcome"]] += 1
                if result["outcome"] not in GOOD or arguments.verbose:
                    line = "{outcome}: {kind}: {name} ({seconds} s, {megabytes} MB): {said}".format(**result)
                    print(line.encode("ascii", "backslashreplace").decode().replace("\n", "\\n"), file=sys.stderr, flush=True)
    counts["all"] = sum(counts.values(), Counter())
    rows = [[kind, str(sum(count.values())), *(str(count[outcome]) for outcome in OUTCOMES)] for kind, count in counts.items()]
    tables.publish("attack", tables.markdown(["class", "files", *OUTCOMES], rows), arguments.write)
    sys.exit(any(outcome not in GOOD for outcome in counts["all"]))


if __name__ == "__main__":
    main()
