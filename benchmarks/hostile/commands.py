"""The real commands, on a few files of each class, with broken standard streams, under limits, and without their partners."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.hostile import Case, SilentlyWrongError, datasets, weights, workdirs

TINY = {"train.steps": 4, "train.log_every": 1, "train.eval_every": 0, "deq.max_steps": 3, "deq.backward_max_steps": 3}
TINY |= {"deq.pretrain_steps": 0, "model.d_model": 16, "model.d_embed": 16, "model.n_head": 2, "model.d_head": 8}
TINY |= {"model.d_inner": 16, "data.eval_batch_size": 64, "data.eval_seq_len": 64, "deq.jacobian_weight": 0.0}
WITHIN = 300
WARNING = re.compile("WARNING:(deq_flax:| )cannot (write|read) ")
"""Lines that a command may log besides its one error: what it has lost and does without."""
STACK = re.compile(r"Traceback|[Ss]tack trace|^\s+@ +0x|Fatal Python error|Check failure", re.MULTILINE)
"""Signs of a stack, Python's or C++'s."""


def training(workdir: Path, *more: str) -> list[str]:
    options = [f"--config.{key}={value}" for key, value in TINY.items()]
    return ["-m", "deq_flax.main", "--config", "configs/wt103.py:tiny", "--workdir", str(workdir), *options, *more]


def run(arguments: Sequence[str], *, before: str = "", redirect: str = "") -> subprocess.CompletedProcess:
    """Run Python under a shell that first does `before`."""
    command = f'{before}; exec "$@" {redirect}' if before else f'exec "$@" {redirect}'
    shell = ["bash", "-c", command, "bash", sys.executable, *arguments]
    return subprocess.run(
        shell, capture_output=True, text=True, timeout=WITHIN, errors="replace", env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )


def judge(done: subprocess.CompletedProcess) -> None:
    """As for files: return after success, UserError after code 2 and one line, beside which there are only known warnings."""
    from deq_flax.errors import UserError

    said = [line for line in done.stderr.splitlines() if not WARNING.match(line)]
    if done.returncode == 2 and len(said) == 1 and said[0].startswith("error: "):
        raise UserError(said[0])
    if done.returncode or said:
        raise RuntimeError(f"code {done.returncode}: {done.stderr[-600:]}")


def convert(path: Path) -> None:
    judge(run(["-m", "deq_flax.convert", str(path), str(path.parent / "out"), "--config", "auto"]))


def train_on(path: Path) -> None:
    judge(run(training(path / "run", "--config.data.name=tokens", f"--config.data.path={path}")))


def train_in(path: Path) -> None:
    judge(run(training(path)))


def plot(path: Path) -> None:
    judge(run(["-m", "deq_flax.plot", "--workdir", str(path), "--nomodel"]))


def train_so(before: str, redirect: str, path: Path) -> None:
    """Train with a broken standard output or under a limit: all steps are in metrics.jsonl, or one line is said."""
    done = run(training(path), before=before, redirect=redirect)
    judge(done)
    steps = [
        line["step"] for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if line["split"] == "train"
    ]
    if steps != [1, 2, 3, 4]:
        raise SilentlyWrongError(f"the steps {steps} are logged")
    said = done.stderr.count("standard output")
    if said > 1:
        raise SilentlyWrongError(f"the loss of reports is said {said} times")


def unused_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def alone(process: int, path: Path) -> None:
    """One process of two, whose partner never comes."""
    start = time.monotonic()
    parts = ["--coordinator", f"localhost:{unused_port()}", "--num_processes=2", f"--process_id={process}", "--patience=5"]
    done = run(training(path, *parts))
    if time.monotonic() - start > 60:
        raise SilentlyWrongError("it took more than a minute")
    judge(done)


def one_killed(number: int, path: Path) -> None:
    """Two processes of which one is killed during training: the other ends within a minute, and says why."""
    from deq_flax.errors import UserError

    port, processes = unused_port(), []
    for i in range(2):
        parts = ["--coordinator", f"localhost:{port}", "--num_processes=2", f"--process_id={i}", "--patience=20"]
        command = [
            sys.executable,
            "-u",
            *training(path, *parts, "--config.train.steps=100000", "--config.train.checkpoint_every=100000"),
        ]
        out = (path / f"out{i}").open("w+")
        processes.append((subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"JAX_PLATFORMS": "cpu"}), out))
    try:
        until = time.monotonic() + WITHIN
        while "step" not in (path / "metrics.jsonl").read_text() if (path / "metrics.jsonl").exists() else True:
            time.sleep(0.5)
            if time.monotonic() > until or any(process.poll() is not None for process, _ in processes):
                raise RuntimeError((path / "out0").read_text()[-500:])
        processes[number][0].send_signal(signal.SIGKILL)
        start = time.monotonic()
        code = processes[1 - number][0].wait(timeout=60)
        text = (path / f"out{1 - number}").read_text(errors="replace")
        reason = re.search(r"^error: process .*another process has ended.*|.*another task died.*", text, re.MULTILINE)
        if not code or not reason or STACK.search(text):
            raise RuntimeError(f"code {code} after {time.monotonic() - start:.0f} s: {text[-600:]}")
        raise UserError(f"code {code} after {time.monotonic() - start:.0f} s: {reason[0][:200]}")
    finally:
        for process, out in processes:
            process.kill()
            process.wait()
            out.close()


def cases(random: np.random.Generator) -> Iterator[Case]:
    deep = weights.dictionary([(weights.nested(1_000_000, b"", b"\x85"), weights.tensor((4,)))])
    for name, make in (
        ("a key a million deep, zip", partial(weights.as_zip, deep)),
        ("a key a million deep, legacy", partial(weights.as_legacy, deep)),
        ("a pipe", lambda path: (os.mkfifo(path), path)[1]),
        ("/dev/zero", lambda path: Path("/dev/zero")),
    ):
        yield Case("commands: convert", name, lambda folder, make=make: make(folder / "x.pth"), convert)
    headers = dict(weights.npy_headers())
    for name in ("brackets 5,000 deep", "a size of 10^30"):
        yield Case(
            "commands: train on",
            name,
            partial(lambda data, folder: datasets.write_tokens(folder, data), headers[name]),
            train_on,
        )

    def written(name: str, content: bytes) -> Callable[[Path], Path]:
        return lambda folder: ((folder / name).write_bytes(content), folder)[1]

    lists = b"[" * 100_000 + b"]" * 100_000 + b"\n"
    yield Case("commands: train in", "config.json 100,000 deep", written("config.json", lists), train_in)
    yield Case("commands: train in", "metrics.jsonl 100,000 deep", written("metrics.jsonl", workdirs.LINES + lists), train_in)
    yield Case("commands: plot", "metrics.jsonl 100,000 deep", written("metrics.jsonl", workdirs.LINES + lists), plot)
    yield Case(
        "commands: plot", "metrics.jsonl is a pipe", lambda folder: (os.mkfifo(folder / "metrics.jsonl"), folder)[1], plot
    )
    for name, before, redirect in (
        ("standard output full", "", "> /dev/full"),
        ("standard output closed", "", ">&-"),
        ("standard output read by nobody", "", "> >(exec <&-)"),
        ("all streams closed", "", "<&- >&- 2>&-"),
        ("48 files open at most", "ulimit -n 48", ""),
        ("files of 64 KB at most", "ulimit -f 64", ""),
        ("files of 1 KB at most", "ulimit -f 1", ""),
    ):
        yield Case("commands: limits", name, lambda folder: folder, partial(train_so, before, redirect))
    for process in range(2):
        yield Case("commands: processes", f"process {process} of two alone", lambda folder: folder, partial(alone, process))
    for number in range(2):
        yield Case("commands: processes", f"process {number} of two killed", lambda folder: folder, partial(one_killed, number))
