"""Laws of several processes: they are one run, which any other number of processes may continue."""

import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from deq_flax.devices.processes import distributed, print_once
from deq_flax.errors import UserError
from tests.commands import ROOT
from tests.train.commands import arguments, finish, metrics, one_process, read_until, several

STEPS = 30
STACK = re.compile(r"Traceback|[Ss]tack trace|^ +@ +0x|Fatal Python error|Check failure", re.MULTILINE)
"""Signs of a stack, Python's or C++'s."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "go with --coordinator"),
        (("auto", 2, None), "leave them out"),
        (("localhost:1", None, 0), "needs --num_processes and --process_id"),
        (("localhost:1", 2, 2), "must be from 0 to 1, not 2"),
        (("localhost", 2, 0), "must be HOST:PORT or auto"),
        ((":1", 2, 0), "must be HOST:PORT or auto"),
        (("localhost:70000", 2, 0), "must be HOST:PORT or auto"),
        (("localhost:x", 2, 0), "must be HOST:PORT or auto"),
    ],
)
def test_contradicting_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message), distributed(*arguments):
        raise AssertionError("entered")


def test_a_single_process_needs_no_coordinator(capsys):
    with distributed(None, None, None):
        print_once("here")
    assert capsys.readouterr().out == "here\n"


def test_the_patience_is_at_least_a_second():
    with pytest.raises(UserError, match="at least 1, not 0"), distributed("localhost:1", 2, 0, patience=0):
        raise AssertionError("entered")


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.slow
def test_a_process_whose_partners_never_come_ends_with_one_line(process):
    """The coordinator without partners, and a wrong address of the coordinator."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    enter = f"with processes.distributed('localhost:{port}', 2, {process}, patience=2): print('entered')"
    program = f"from deq_flax.devices import processes\n{enter}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: process {process}: the other processes have not all answered within 2 seconds")
    assert "--patience" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("sink", "words"), [("> /dev/full", "No space left"), ("> >(exec <&-)", "Broken pipe")])
def test_reports_that_nobody_takes_are_said_once(sink, words):
    program = "from deq_flax.devices.processes import print_once\nfor i in range(20000): print_once(i)"
    shell = ["bash", "-c", f'"$0" -c "$1" {sink}; echo "code $?" >&2', sys.executable, program]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stderr.count("cannot write to standard output") == 1 and words in done.stderr
    assert done.stderr.endswith("code 0\n")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    code, out = finish(one_process(*arguments(workdir, train__steps=STEPS, mesh__fsdp=2), devices=4))
    assert code == 0, out
    return workdir


def assert_same_losses(workdir, other):
    ours, theirs = metrics(workdir), metrics(other)
    assert [(line["step"], line["split"]) for line in ours] == [(line["step"], line["split"]) for line in theirs]
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=2e-6)


def children(process):
    """Ids of the processes that a process started."""
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in listed if "deq_flax.main" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.faults
def test_two_processes_are_one_run_that_another_count_continues(alone, tmp_path):
    run = arguments(tmp_path, train__steps=STEPS)
    processes = several(2, *run, "--config.mesh.fsdp=2", devices=2)
    read_until(processes, "step  7/30")
    # A signal to one of them stops all; only the first prints.
    subprocess.run(["kill", "-TERM", str(children(processes)[1])], check=True)
    code, out = finish(processes)
    assert code == 0 and out.count("stopped at step") == 1, out

    processes = one_process(*run, "--config.mesh.data=2", devices=2)
    read_until(processes, "step 13/30")
    processes.send_signal(signal.SIGTERM)
    code, out = finish(processes)
    assert code == 0 and "continuing from" not in out and "stopped at step" in out, out

    code, out = finish(several(2, *run, "--config.mesh.fsdp=4", devices=2))
    assert code == 0 and out.count("continuing from") == 1 and out.count("done: best") == 1, out
    assert_same_losses(tmp_path, alone)
    code, again = finish(several(2, *run, "--mode", "eval", devices=2))
    assert code == 0 and again.splitlines()[-1].split("|")[1:] == out.splitlines()[-1].split("|")[1:]


@pytest.mark.faults
def test_an_error_of_one_process_ends_all(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    code, out = finish(several(2, *arguments(tmp_path, train__steps=2)), timeout=120)
    assert code != 0 and "cannot write checkpoints" in out


@pytest.mark.faults
@pytest.mark.parametrize("number", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_says_why(tmp_path, number):
    options = dict(train__steps=100_000, train__checkpoint_every=100_000, train__eval_every=0)
    processes = several(2, *arguments(tmp_path, **options), "--patience=20")
    read_until(processes, "step")
    subprocess.run(["kill", "-KILL", str(children(processes)[number])], check=True)
    start = time.monotonic()
    code, out = finish(processes, timeout=90)
    assert code != 0 and time.monotonic() - start < 60
    assert "another process has ended" in out or "another task died" in out, out
    assert not STACK.search(out), out
