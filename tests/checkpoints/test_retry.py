"""Laws of saving on an unreliable disk: no failure passes unnoticed, none ends the run before the final save."""

import jax.numpy as jnp
import pytest

from deq_flax.checkpoints import retry
from deq_flax.checkpoints.checkpoints import Checkpoints
from deq_flax.checkpoints.retry import RetryingSaver
from deq_flax.checkpoints.stored_step import DiskError
from tests.checkpoints.saving import opened

TREES = {"params": {"w": jnp.zeros(3)}, "rest": {}, "ema": None}


class Disk:
    """Checkpoints on a disk that can refuse, at once or while writing in the background."""

    def __init__(self):
        self.full, self.writing, self.refused, self.steps, self.attempts = False, False, False, [], 0

    def save(self, step, **items):
        self.attempts += 1
        if self.full:
            raise DiskError("full")
        self.steps.append(step)

    def is_saving(self):
        return self.writing

    def wait(self):
        self.writing = False
        if self.refused:
            self.refused = False
            raise DiskError("full")


@pytest.fixture
def disk():
    return Disk()


def test_what_is_saved_can_be_restored_with_its_metadata(tmp_path):
    with opened(tmp_path) as checkpoints:
        RetryingSaver(checkpoints, {"config": {"a": 1}}).save_final(4, TREES, {"loss": 2.0})
    restored = Checkpoints(tmp_path, read_only=True).restore_best(params=TREES["params"])
    assert (restored.step, restored.meta["config"], restored.meta["metrics"]) == (4, {"a": 1}, {"loss": 2.0})


def test_a_refused_save_is_logged_and_tried_again(disk, caplog):
    saver = RetryingSaver(disk, {})
    disk.full = True
    saver.save(1, TREES, None)
    assert saver.needs_retry() and "training continues and tries again" in caplog.text
    disk.full = False
    saver.save(2, TREES, None)
    assert not saver.needs_retry() and disk.steps == [2]


def test_a_failure_in_the_background_is_noticed_once_it_is_over(disk):
    saver = RetryingSaver(disk, {})
    saver.save(1, TREES, None)
    disk.writing, disk.refused = True, True
    assert not saver.needs_retry() and disk.writing
    disk.writing = False
    assert saver.needs_retry()


def test_nothing_is_saved_before_the_log_is_on_disk(disk, caplog):
    on_disk = False
    saver = RetryingSaver(disk, {}, may_save=lambda: on_disk)
    saver.save(1, TREES, None)
    assert saver.needs_retry() and disk.attempts == 0 and "log" in caplog.text
    on_disk = True
    saver.save(2, TREES, None)
    assert not saver.needs_retry() and disk.steps == [2]


def test_the_final_save_is_tried_again_and_then_fails(disk, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        disk.full = len(pauses) < 3

    monkeypatch.setattr(retry.time, "sleep", sleep)
    disk.full = True
    RetryingSaver(disk, {}).save_final(1, TREES, None)
    assert disk.steps == [1] and pauses == [1, 2, 4]

    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    disk.full, disk.attempts = True, 0
    with pytest.raises(DiskError, match="full"):
        RetryingSaver(disk, {}).save_final(2, TREES, None)
    assert disk.attempts == 5


def test_with_several_processes_a_failure_ends_the_run(disk, monkeypatch):
    monkeypatch.setattr(retry.jax, "process_count", lambda: 2)
    disk.full = True
    with pytest.raises(DiskError):
        RetryingSaver(disk, {}).save(1, TREES, None)
