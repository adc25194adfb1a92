"""Laws of the workdir's lock: one holder at a time, and the lock of a dead one is taken over."""

import json
import os
import socket
import subprocess
import threading
import time

import pytest

from deq_flax.checkpoints import workdir_lock
from deq_flax.checkpoints.workdir_lock import WorkdirLock
from deq_flax.errors import UserError


def write_lock(folder, **changes):
    """Write the lock that another process would have written."""
    who = {"host": socket.gethostname(), "pid": 1, "since": "yesterday", "machine": workdir_lock._machine(), "token": "other"}
    (folder / "run.lock").write_text(json.dumps(who | changes))


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(workdir_lock, "PATIENCE", 0.4)
    monkeypatch.setattr(workdir_lock, "BEAT", 0.02)


def test_a_second_holder_is_refused_with_the_name_of_the_first(tmp_path):
    with WorkdirLock(tmp_path):
        text = (tmp_path / "run.lock").read_text()
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on {socket.gethostname()} since \d.* UTC: "):
            WorkdirLock(tmp_path).__enter__()
        assert (tmp_path / "run.lock").read_text() == text
    with WorkdirLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_dead_holder_on_this_machine_is_recognized_at_once(tmp_path, sleeper, caplog):
    started = workdir_lock._start_of(sleeper.pid)
    write_lock(tmp_path, pid=sleeper.pid, started=started)
    with pytest.raises(UserError, match=f"process {sleeper.pid} .* since yesterday"):
        WorkdirLock(tmp_path).__enter__()
    write_lock(tmp_path, pid=sleeper.pid, started=f"{started}1")  # the id is another process's by now
    begin = time.monotonic()
    with WorkdirLock(tmp_path) as lock:
        lock.check()
    sleeper.kill()
    write_lock(tmp_path, pid=sleeper.pid, started=started)
    while workdir_lock._start_of(sleeper.pid) != "ended":  # not waited for yet
        time.sleep(0.01)
    for wait in (lambda: None, sleeper.wait):
        wait()
        write_lock(tmp_path, pid=sleeper.pid, started=started)
        with WorkdirLock(tmp_path):
            pass
    assert time.monotonic() - begin < 5
    assert caplog.text.count("which no longer exists") == 3


def test_a_holder_on_another_machine_is_alive_while_it_beats(tmp_path, quick):
    write_lock(tmp_path, machine="another", host="node7", pid=12)
    path, end = tmp_path / "run.lock", threading.Event()

    def beat():
        while not end.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="in use by process 12 on node7"):
        WorkdirLock(tmp_path).__enter__()
    end.set()
    thread.join()
    begin = time.monotonic()
    with WorkdirLock(tmp_path):
        assert time.monotonic() - begin >= 0.4


def test_a_holder_beats(tmp_path, quick):
    with WorkdirLock(tmp_path):
        first = (tmp_path / "run.lock").stat().st_mtime_ns
        time.sleep(0.2)
        assert (tmp_path / "run.lock").stat().st_mtime_ns > first
        (tmp_path / "run.lock").unlink()
        time.sleep(0.2)
        assert (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("text", ["", "[1]", "no json", '{"machine": 3, "pid": "x"}'])
def test_a_damaged_lock_is_taken_over_if_nobody_renews_it(tmp_path, quick, text):
    (tmp_path / "run.lock").write_text(text)
    with WorkdirLock(tmp_path) as lock:
        lock.check()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    for _ in range(10):
        write_lock(tmp_path, pid=-1)
        start, end, held = threading.Barrier(8), threading.Barrier(8), []

        def enter(start=start, end=end, held=held):
            lock = WorkdirLock(tmp_path)
            start.wait()
            try:
                lock.__enter__()
                held.append(lock)
            except UserError:
                pass
            end.wait()

        threads = [threading.Thread(target=enter) for _ in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert len(held) == 1
        held[0].check()
        held[0].__exit__()


def test_a_holder_that_was_taken_over_ends_and_leaves_the_other_alone(tmp_path):
    with WorkdirLock(tmp_path) as lock:
        write_lock(tmp_path, host="node7", pid=12)
        with pytest.raises(UserError, match="was taken over by process 12 on node7"):
            lock.check()
    assert (tmp_path / "run.lock").exists()


def test_folders_made_for_the_lock_are_removed_if_they_stay_empty(tmp_path):
    with WorkdirLock(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with WorkdirLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "metrics.jsonl").write_text("")
    assert (tmp_path / "a" / "b" / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the workdir .*file/run: Not a directory"):
        WorkdirLock(tmp_path / "file" / "run").__enter__()


def test_a_lock_that_is_no_file_is_one_line(tmp_path):
    path = tmp_path / "run.lock"
    for make, remove in (
        (path.mkdir, path.rmdir),
        (lambda: path.symlink_to("gone"), path.unlink),
        (lambda: os.mkfifo(path), path.unlink),
    ):
        make()
        with pytest.raises(UserError, match=r"cannot write to the workdir .*: run\.lock is not an ordinary file"):
            WorkdirLock(tmp_path).__enter__()
        remove()
