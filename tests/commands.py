"""Commands, run as subprocesses."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".pytest_cache" / "xla"
"""Cache of compiled programs, which halves the time of a second run."""


def command(name, *arguments, timeout=120):
    """Run `python -m deq_flax.NAME ARGUMENTS`; the result holds its exit code and output."""
    return subprocess.run(
        [sys.executable, "-m", f"deq_flax.{name}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


FORKS = """
import json, os, runpy, sys, tempfile
import deq_flax.config  # imports all that a command does, but for its own flags

for arguments in json.loads(sys.argv[2]):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.argv = [sys.argv[1], *arguments]
            runpy.run_module(f"deq_flax.{sys.argv[0]}", run_name="__main__")
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([code, out.read().decode(), err.read().decode()]), flush=True)
"""


def commands(name, argument_lists, timeout=120):
    """Run `command` for each list of arguments, in forks of one process: imports take longer than a command that refuses."""
    lists = json.dumps([[str(argument) for argument in arguments] for arguments in argument_lists])
    done = subprocess.run(
        [sys.executable, "-c", FORKS, name, lists], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=True
    )
    return [subprocess.CompletedProcess(name, *json.loads(line)) for line in done.stdout.splitlines()]
