"""Timing of libraries against each other, in one process each, in turns.

A temporary slowdown of the machine then affects all of them, and medians are compared. Each turn runs the program twice and
times the second run, so that data that the others have evicted from the caches is back.
"""

import json
import os
import platform
import subprocess
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from time import perf_counter, sleep
from typing import Any

from benchmarks import tables

THREADS = 2

MODES = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}
"""JAX's names for the precision of float32 products; in the last mode operands are bfloat16."""

Times = dict[tuple[str, str], float]
"""Median seconds by (library, case)."""

Facts = dict[str, dict[str, Any]]
"""Facts that a library's worker reported, by library."""

Programs = Mapping[str, Callable[[], object]]
"""Functions to time, by case."""


def command(
    name: str,
    script: str,
    doc: str | None,
    *,
    libraries: Mapping[str, str],
    cases: tuple[str, ...],
    programs: Callable[[str, str], tuple[Programs, Mapping[str, Any]]],
    table: Callable[[Times, Facts], str],
) -> None:
    """Run the command line of a benchmark.

    Args:
      name: of the table in README.md.
      script: path of the benchmark, which is started again for each library.
      doc: the help text.
      libraries: name -> the distribution that must be installed; the first is ours.
      cases: names of the programs to time, in this order.
      programs: (library, dtype of the model) -> the programs, and facts to report with them.
      table: (times, facts) -> the text to publish.
    """
    parser = tables.parser(doc, rounds=9)
    parser.add_argument("--mode", choices=MODES, default="float32", help="of matrix products; PyTorch takes part in float32")
    parser.add_argument("--worker", help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(*programs(arguments.worker, "bfloat16" if arguments.mode == "bfloat16" else "float32"))
    if arguments.mode != "float32":
        libraries = {library: distribution for library, distribution in libraries.items() if library != "torchdeq"}
        name = f"{name}, {arguments.mode}"
    times, facts = measure(script, libraries, cases, arguments.rounds, arguments.mode)
    if not facts:
        sys.exit(1)
    on = machine([libraries[library] for library in facts], next(iter(facts.values())))
    tables.publish(name, f"{on}. {table(times, facts)}", arguments.write)


def work(programs: Programs, facts: Mapping[str, Any]) -> None:
    """Run a worker: for each line on stdin, the name of a case, time its program and print the seconds."""
    for program in programs.values():
        program()
    print(json.dumps({"cases": list(programs), "facts": {"device": _device()} | dict(facts)}), flush=True)
    for line in sys.stdin:
        program = programs[line.strip()]
        program()
        start = perf_counter()
        program()
        print(perf_counter() - start, flush=True)


def measure(script: str, libraries: Mapping[str, str], cases: tuple[str, ...], rounds: int, mode: str) -> tuple[Times, Facts]:
    """Times and facts of all libraries. One that is not installed or fails in this mode is left out, with a note on stderr."""
    environment = os.environ | {
        "PYTHONPATH": os.getcwd(),
        "OMP_NUM_THREADS": str(THREADS),
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={THREADS}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share an accelerator's memory
        "JAX_DEFAULT_MATMUL_PRECISION": MODES[mode],
    }
    workers, times, facts = {}, {}, {}
    for library, distribution in libraries.items():
        try:
            version(distribution)
        except PackageNotFoundError:
            print(f"{library}: not installed, left out", file=sys.stderr)
            continue
        process = subprocess.Popen(
            [sys.executable, script, "--worker", library, "--mode", mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        line = process.stdout.readline()
        if not line:
            print(f"{library}: fails, left out", file=sys.stderr)
            continue
        ready = json.loads(line)
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


def machine(distributions: list[str], facts: Mapping[str, Any] | None = None) -> str:
    """Description of the machine and of installed versions; `facts` of a worker name its accelerator, if it has one."""
    versions = ", ".join(f"{name} {version(name)}" for name in distributions)
    on = f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} threads"
    device = (facts or {}).get("device", "cpu")
    return f"{on if device == 'cpu' else device}, Python {platform.python_version()}, {versions}"


def _device() -> str:
    """JAX's name of the device that this process uses, 'cpu' without JAX."""
    if "jax" not in sys.modules:
        return "cpu"
    import jax

    return jax.devices()[0].device_kind
