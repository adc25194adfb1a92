"""What a higher limit on evaluations costs: time for each evaluation, and memory of the gradient.

    python -m benchmarks.steps [--rounds 9] [--write benchmarks/steps.md]

Time: f costs nothing, the solver has a fixed history, and nothing converges; so the time of an evaluation is the solver's own,
and must not depend on the limit (it does when XLA copies the history in every step). Memory: what the compiled gradient of the
layer needs besides its arguments, by XLA's own analysis.
"""

import argparse
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from statistics import median
from time import perf_counter

import jax
import jax.numpy as jnp

from benchmarks.layer import jax_layer, weights
from deq_flax import Anderson, Broyden, Implicit, PhantomGradient, Picard, Reversible, Shine, Unroll, fixed_point

LIMITS = (10, 20, 40, 80)
SOLVERS = {
    "Picard": lambda limit: Picard(tol=0.0, max_steps=limit),
    "Anderson(memory=6)": lambda limit: Anderson(tol=0.0, max_steps=limit),
    "Broyden(memory=10)": lambda limit: Broyden(tol=0.0, max_steps=limit, memory=10),
    "Broyden(), as many pairs as steps": lambda limit: Broyden(tol=0.0, max_steps=limit),
}
GRADIENTS = {
    "Implicit, Anderson": lambda limit: (Anderson(max_steps=limit), Implicit()),
    "Implicit, Broyden(memory=10)": lambda limit: (Broyden(max_steps=limit, memory=10), Implicit()),
    "Implicit, Broyden()": lambda limit: (Broyden(max_steps=limit), Implicit()),
    "Shine, Broyden(memory=10)": lambda limit: (Broyden(max_steps=limit, memory=10), Shine()),
    "PhantomGradient": lambda limit: (Anderson(max_steps=limit), PhantomGradient()),
    "Reversible": lambda limit: (Picard(max_steps=limit), Reversible()),
    "Unroll": lambda limit: (Picard(max_steps=limit), Unroll(limit)),
}


def microseconds_per_evaluation(rounds: int) -> dict[str, list[float]]:
    """Medians by solver, one for each limit. All take turns, so that a slow spell of the machine hits all of them."""
    z0 = jnp.zeros((4, 64 * 256))
    a = jnp.linspace(-0.99, 0.99, z0.shape[1])[None]

    def program_of(solver) -> Callable:
        return jax.jit(lambda z: fixed_point(lambda z: a * z + 1, z, solver=solver).value)

    programs = {(name, limit): program_of(make(limit)) for name, make in SOLVERS.items() for limit in LIMITS}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in programs}
    for _ in range(rounds + 1):  # the first round compiles
        for key, program in programs.items():
            start = perf_counter()
            jax.block_until_ready(program(z0))
            times[key].append(perf_counter() - start)
    return {name: [1e6 * median(times[name, limit][1:]) / limit for limit in LIMITS] for name in SOLVERS}


def megabytes_of_the_gradient() -> dict[str, list[float]]:
    """Temporary memory of the compiled gradient, by estimator, one for each limit."""
    w = {name: jnp.asarray(value) for name, value in weights().items()}
    z0 = jnp.zeros((*w["x"].shape[:2], w["out"].shape[0]))

    def megabytes(solver, gradient) -> float:
        def loss(w):
            return jnp.sum(jnp.sin(fixed_point(lambda z: jax_layer(w, z), z0, solver=solver, gradient=gradient).value))

        analysis = jax.jit(jax.grad(loss)).lower(w).compile().memory_analysis()
        return analysis.temp_size_in_bytes / 1e6

    return {name: [megabytes(*make(limit)) for limit in LIMITS] for name, make in GRADIENTS.items()}


def table(head: str, rows: dict[str, list[float]]) -> list[str]:
    lines = [f"| {head} | " + " | ".join(f"{limit}" for limit in LIMITS) + " |", "|---" * (len(LIMITS) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |" for name, values in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", help="also write the tables to this file")
    arguments = parser.parse_args()
    text = "\n".join(
        [
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {version('jax')}",
            "",
            "Microseconds of the solver for one evaluation, state (4, 16384), by the limit on evaluations:",
            "",
            *table("solver", microseconds_per_evaluation(arguments.rounds)),
            "",
            "Megabytes of the gradient of the layer, by the limit on evaluations:",
            "",
            *table("gradient", megabytes_of_the_gradient()),
            "",
        ]
    )
    print(text)
    if arguments.write:
        with open(arguments.write, "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
