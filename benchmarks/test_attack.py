"""The attack notices what it looks for, and finds nothing of it in the package."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.attack import GOOD, ROOMS, all_cases, attack

ROOT = Path(__file__).parent.parent

FORBIDDEN = """
import os, socket, subprocess, sys
from pathlib import Path
from benchmarks.attack import Watch
here = Path(sys.argv[1])
watch = Watch(here)
watch.on = True
attempts = {
    "process": lambda: subprocess.run(["true"]),
    "shell": lambda: os.system("true"),
    "fork": os.fork,
    "socket": lambda: socket.create_connection(("localhost", 9)),
    "write": lambda: open(here.parent / "outside", "w"),
    "delete": lambda: os.remove(here.parent / "outside"),
    "link": lambda: os.symlink("x", here.parent / "outside"),
    "within": lambda: (here / "x").write_text("x"),
    "read": lambda: open("/dev/null").close(),
}
for name, attempt in attempts.items():
    watch.events = []
    try:
        attempt()
    except PermissionError:
        pass
    print(name, len(watch.events) > 0)
"""


def test_processes_sockets_and_writes_elsewhere_are_noticed(tmp_path):
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-c", FORBIDDEN, str(tmp_path / "here")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    noticed = dict(line.split() for line in out.splitlines())
    harmless = ("within", "read")
    assert noticed == {name: str(name not in harmless) for name in noticed} and len(noticed) == 9


def chosen(room, kind):
    return [i for i, case in enumerate(all_cases(room, 0)) if case.kind == kind]


@pytest.mark.slow
def test_programs_in_place_of_images_are_skipped_in_a_watched_process(tmp_path):
    numbers = chosen("images", "images: programs")
    results = list(attack("images", numbers, 0, tmp_path))
    assert [result["outcome"] for result in results] == ["refused"] * len(numbers) and numbers


@pytest.mark.faults
@pytest.mark.parametrize("room", ROOMS)
def test_no_hostile_file_is_a_finding(room, tmp_path):
    """Every third file of the attack; `python -m benchmarks.attack` tries all."""
    numbers = range(len(list(all_cases(room, 0))))[::3]
    findings = [result for result in attack(room, list(numbers), 0, tmp_path) if result["outcome"] not in GOOD]
    assert not findings
