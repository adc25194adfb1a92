"""Seconds to compile the training step of the full WikiText-103 model, with JAX's persistent cache cold and warm.

    python -m benchmarks.compile_time [--config configs/wt103.py ...] [--write]

Each in a process of its own, at 14 sequences a device: tracing and lowering, which are never cached, and compiling. A run
caches its programs in the folder that the environment variable JAX_COMPILATION_CACHE_DIR names.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from time import perf_counter

from benchmarks import tables, training

CONFIGS = ("configs/wt103.py:base", "configs/wt103.py:ift", "configs/wt103.py:deq_lm", "configs/wt103.py:explicit")


def seconds(path: str) -> dict[str, float | str]:
    """Seconds to lower and to compile the training step of a config, and the device."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        changes = {"data.batch_size": 14, "deq.pretrain_steps": 0} | training.text(folder, 267_735, 14 * 151)
        it = training.Training(training.resolved(path, changes))
    start = perf_counter()
    lowered = it.traced().lower()
    middle = perf_counter()
    lowered.compile()
    return {"lowering": middle - start, "compiling": perf_counter() - middle, "device": jax.devices()[0].device_kind}


def measured(path: str, cache: str) -> dict[str, float | str]:
    """`seconds` in a process of its own, with the programs cached in this folder."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "benchmarks.compile_time", "--config", path, "--worker"]
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--config", nargs="+", default=CONFIGS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(seconds(*arguments.config)))
        return
    rows, device = [], ""
    for path in arguments.config:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = measured(path, cache), measured(path, cache)
        device = cold["device"]
        rows.append(
            [f"`{path}`", *(f"{s:.1f}" for s in (cold["lowering"], cold["compiling"], warm["lowering"], warm["compiling"]))]
        )
    on = f"{device}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {version('jax')}. Seconds."
    head = ["config", "lowering", "compiling", "lowering, cache warm", "compiling, cache warm"]
    tables.publish("compile_time", f"{on}\n\n{tables.markdown(head, rows)}", arguments.write)


if __name__ == "__main__":
    main()
