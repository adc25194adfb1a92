"""Faults of real runs: kills, damaged checkpoints, full disks. The outcome is that of a run without faults."""

import random
import resource
import shutil
import signal
import time

import pytest

from tests.train.commands import arguments, finish, metrics, one_process, read_until
from tests.train.small import arrays

pytestmark = pytest.mark.faults

STEPS = 240


def command(workdir, checkpoint_every=5):
    return arguments(
        workdir, train__steps=STEPS, train__checkpoint_every=checkpoint_every, train__eval_every=60, train__ema_decay=0.9
    )


@pytest.fixture
def run():
    """A function that starts the command; its processes are killed in the end."""
    started = []

    def start(*arguments):
        started.append(one_process(*arguments))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("clean")
    code, out = finish(one_process(*command(workdir, 1000)))
    assert code == 0, out
    return workdir


def assert_same_outcome(workdir, other):
    """Bit for bit: every line of the metrics, once, and every array of the last checkpoint."""
    assert metrics(workdir) == metrics(other)
    assert arrays(workdir, STEPS) == arrays(other, STEPS)


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def test_killed_at_twenty_moments(clean, tmp_path, run):
    """It saves after every step, so that many kills fall within a save."""
    chance, within_a_save = random.Random(0), 0
    for _ in range(20):
        process = run(*command(tmp_path, 1))
        read_until(process, "ETA")
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        code, out = finish(process)
        assert code == -signal.SIGKILL, out
        within_a_save += any("tmp" in path.name for path in (tmp_path / "checkpoints").iterdir())
    code, out = finish(run(*command(tmp_path)))
    assert code == 0 and "damaged" not in out, out
    assert within_a_save >= 3
    assert_same_outcome(tmp_path, clean)


def test_stopped_then_damaged_in_every_way(clean, tmp_path, run):
    """SIGTERM, each time with the newest checkpoint damaged before the run is started again."""

    def empty(step):
        for path in step.rglob("*"):
            path.unlink() if path.is_file() else None

    def truncate(step):
        for path in (step / "params").rglob("*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if path.is_file() else None

    def flip(step):
        path = max((path for path in (step / "rest").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)

    def halve(step):
        shutil.rmtree(step / "ema")

    broken = None
    for damage in (empty, truncate, flip, halve):
        process = run(*command(tmp_path))
        lines = read_until(process, "step  12/" if broken is None else "ETA")
        if broken is not None:
            assert any(f"checkpoints/{broken} is damaged" in line for line in lines)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        code, out = finish(process)
        assert code == 0 and "stopped at step" in out and time.monotonic() - asked < 20, out
        broken = steps_in(tmp_path)[-1]
        damage(tmp_path / "checkpoints" / str(broken))
    whole = tmp_path / "checkpoints" / str(steps_in(tmp_path)[-2])
    shutil.copytree(whole, tmp_path / "kept")
    for step in steps_in(tmp_path)[:-1]:
        empty(tmp_path / "checkpoints" / str(step))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    code, out = finish(run(*command(tmp_path)))
    assert code == 2 and "no whole checkpoint" in out and "start afresh" in out, out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(whole)
    (tmp_path / "kept").rename(whole)
    code, out = finish(run(*command(tmp_path)))
    assert code == 0, out
    assert_same_outcome(tmp_path, clean)


def test_a_disk_that_is_full_for_a_while(clean, tmp_path, run):
    process = run(*command(tmp_path))
    read_until(process, "step  12/")
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2_000, hard))
    lines = read_until(process, "cannot write a checkpoint") + read_until(process, "ETA")
    assert any("File too large" in line and "training continues" in line for line in lines), lines
    good = steps_in(tmp_path)
    for _ in range(20):
        read_until(process, "ETA")
    assert good and steps_in(tmp_path) == good
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    code, out = finish(process)
    assert code == 0, out
    assert_same_outcome(tmp_path, clean)


def test_a_folder_that_cannot_be_written_to_keeps_the_last_good_checkpoint(clean, tmp_path, run):
    process = run(*command(tmp_path))
    read_until(process, "step  12/")
    folder = tmp_path / "checkpoints"
    folder.rename(tmp_path / "away")
    folder.write_text("not a folder")
    read_until(process, "cannot write a checkpoint")
    read_until(process, "ETA")
    process.kill()
    finish(process)
    folder.unlink()
    (tmp_path / "away").rename(folder)
    process = run(*command(tmp_path))
    read_until(process, "continuing from the checkpoint of step")
    code, out = finish(process)
    assert code == 0, out
    assert_same_outcome(tmp_path, clean)


def test_other_shapes_are_refused_before_compilation(clean, run):
    code, out = finish(run(*command(clean), "--config.model.d_inner=24"))
    assert code == 2 and "model.d_inner" in out and "compiling" not in out
    other = clean.with_name("other")
    start_from = f"--config.checkpoint.init_from={clean}"
    code, out = finish(run(*command(other), "--config.model.d_inner=24", start_from))
    assert code == 2 and "does not fit this config" in out and "compiling" not in out, out
    code, out = finish(run(*command(other), "--config.train.steps=2", "--config.train.seed=3", start_from))
    assert code == 0 and "starting from the weights" in out, out
