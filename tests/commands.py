"""The commands, as a user starts them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".pytest_cache" / "xla"
"""Of compiled programs, which halves the time of a second run."""


def command(name, *arguments, timeout=120):
    """`python -m deq_flax.NAME ARGUMENTS` until it ends: its exit code and what it printed."""
    return subprocess.run(
        [sys.executable, "-m", f"deq_flax.{name}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
