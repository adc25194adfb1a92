"""Commands, run as subprocesses."""

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
