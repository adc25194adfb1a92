"""Timing libraries against each other: one process each, all alive at once, taking turns.

A slow spell of the machine then hits all of them, and medians are compared. Each turn runs the program twice and times the
second, so that what the others have evicted from the caches is back.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from time import perf_counter, sleep

THREADS = 2

Times = dict[tuple[str, str], float]
"""Median seconds by (library, case)."""


def work(programs: Mapping[str, Callable[[], object]], facts: Mapping[str, object] | None = None) -> None:
    """What a worker does: answer each line on stdin, a case, with the seconds that its program took."""
    for program in programs.values():
        program()
    print(json.dumps({"cases": list(programs), "facts": {"device": _device()} | dict(facts or {})}), flush=True)
    for line in sys.stdin:
        program = programs[line.strip()]
        program()
        start = perf_counter()
        program()
        print(perf_counter() - start, flush=True)


def measure(
    script: str, libraries: Mapping[str, str], cases: tuple[str, ...], rounds: int
) -> tuple[Times, dict[str, dict[str, object]]]:
    """Times, and the facts that each worker told. `libraries`: name -> the distribution that must be installed.

    `script --worker NAME` must call `work`. A library that is not installed is left out, and said to be.
    """
    environment = os.environ | {
        "PYTHONPATH": os.getcwd(),
        "OMP_NUM_THREADS": str(THREADS),
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={THREADS}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share an accelerator's memory
    }
    workers, times, facts = {}, {}, {}
    for library, distribution in libraries.items():
        try:
            version(distribution)
        except PackageNotFoundError:
            print(f"{library}: not installed, left out", file=sys.stderr)
            continue
        process = subprocess.Popen(
            [sys.executable, script, "--worker", library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        ready = json.loads(process.stdout.readline())
        workers[library], facts[library] = (process, ready["cases"]), ready["facts"]
        print(f"{library}: ready", file=sys.stderr)
    for number in range(rounds + 1):  # the first round warms up
        for case in cases:
            for library in list(workers)[:: 1 if number % 2 else -1]:
                process, known = workers[library]
                if case in known:
                    sleep(0.25)  # until the threads of the last library have stopped spinning
                    process.stdin.write(case + "\n")
                    process.stdin.flush()
                    times.setdefault((library, case), []).append(float(process.stdout.readline()))
    for process, _ in workers.values():
        process.stdin.close()
        process.wait()
    return {key: median(values[1:]) for key, values in times.items()}, facts


def machine(distributions: list[str], facts: Mapping[str, object] | None = None) -> str:
    """What a table was measured on; `facts` of a worker name its accelerator, if it has one."""
    versions = ", ".join(f"{name} {version(name)}" for name in distributions)
    on = f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} threads"
    device = (facts or {}).get("device", "cpu")
    return f"{on if device == 'cpu' else device}, Python {platform.python_version()}, {versions}"


def _device() -> str:
    """JAX's name of the device that this process uses."""
    if "jax" not in sys.modules:
        return "cpu"
    import jax

    return jax.devices()[0].device_kind
