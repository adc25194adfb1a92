"""Laws of several processes: they are one run, which any other number of processes may continue."""

import pathlib
import signal
import subprocess

import numpy as np
import pytest

from deq_flax.devices.processes import distributed, print_once
from deq_flax.errors import UserError
from tests.train.commands import arguments, finish, metrics, one_process, read_until, several

STEPS = 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "go with --coordinator"),
        (("auto", 2, None), "leave them out"),
        (("localhost:1", None, 0), "needs --num_processes and --process_id"),
        (("localhost:1", 2, 2), "must be from 0 to 1, not 2"),
        (("localhost", 2, 0), "must be HOST:PORT or auto"),
    ],
)
def test_contradicting_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message), distributed(*arguments):
        raise AssertionError("entered")


def test_a_single_process_needs_no_coordinator(capsys):
    with distributed(None, None, None):
        print_once("here")
    assert capsys.readouterr().out == "here\n"


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
