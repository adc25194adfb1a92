"""Full-size training steps on an accelerator: time, solver overhead, and utilization of its arithmetic.

    python -m benchmarks.utilization [--config configs/wt103.py:base ...] [--mode float32 tf32 bfloat16] [--batch 56] [--write]

A step's operations are those of its matrix products, counted in its program: evaluations of f, vector-Jacobian products, and
one unrolled evaluation with everything around it; not the recomputation of rematerialization, nor the tail clusters of the
softmax. Their rate is compared with that of one large product of the same type, measured here. `--small` makes the models
small, to try the command on a CPU.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import tables, training, turns
from deq_flax.compilation.operations import operations_by_part
from deq_flax.config import Config

CONFIGS = ("configs/wt103.py:base", "configs/wt103.py:deq_lm")
SMALL = {
    **{"model.d_model": 32, "model.d_embed": 32, "model.n_head": 2, "model.d_head": 16, "model.d_inner": 64},
    **{"model.cutoffs": (500, 800), "model.mem_len": 8, "data.seq_len": 8},
}


def needed(config: Config) -> float:
    """The operations of a step, as the module's docstring defines them."""

    def unrolled(layers: int) -> float:
        it = training.Training(replace(config, deq=replace(config.deq, pretrain_layers=layers)))
        # Its loop evaluates the residual that is reported.
        return operations_by_part(it.traced(unrolled=True).jaxpr)["outside"]

    one, two, steps = unrolled(1), unrolled(2), config.deq.max_steps
    if config.deq.gradient == "unroll":
        return one + (steps - 1) * (two - one)
    it = training.Training(config)
    weights = it.run.state.params, it.run.state.variables
    return one + sum(operations_by_part(jax.make_jaxpr(loop)(*weights).jaxpr)["outside"] for loop in it.loops())


def seconds(program: Callable[[], None], rounds: int) -> float:
    """The median time of a program after its first run."""
    program()
    times = []
    for _ in range(rounds):
        start = perf_counter()
        program()
        times.append(perf_counter() - start)
    return median(times)


def peak_rate(mode: str, size: int, rounds: int) -> float:
    """Operations a second of one product of square matrices of this size."""
    dtype = jnp.bfloat16 if mode == "bfloat16" else jnp.float32
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds(lambda: jax.block_until_ready(product(a, b)), rounds)


def row(path: str, mode: str, peak: float, arguments: Any) -> list[str]:
    """The table row of a config in a mode; `peak`: the rate of one product, operations a second."""
    with tempfile.TemporaryDirectory() as folder:
        words, length = (1000, 8) if arguments.small else (267_735, 150)
        steps = training.resolved(path).deq.max_steps
        changes = training.exactly(steps) | training.text(folder, words, arguments.batch * (length + 1) * 2)
        changes |= {"data.batch_size": arguments.batch, "model.dtype": "bfloat16" if mode == "bfloat16" else "float32"}
        config = training.resolved(path, changes | (SMALL if arguments.small else {}))
        solves = config.deq.gradient != "unroll"
        programs = training.Training(config).programs()
        time = {case: seconds(program, arguments.rounds) for case, program in programs.items() if solves or case == "step"}
        rate = needed(config) / time["step"]
    ratio = f"{time['step'] / training.sum_of_parts(time, steps, 2):.2f}" if solves else ""
    tokens = arguments.batch * length / time["step"]
    numbers = [f"{1e3 * time['step']:.0f}", ratio, f"{tokens:,.0f}", f"{rate / 1e12:.2f}", f"{rate / peak:.1%}"]
    return [f"`{path}`, {steps} evaluations each way", mode, *numbers]


def main() -> None:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument("--config", nargs="+", default=CONFIGS)
    parser.add_argument("--mode", nargs="+", choices=turns.MODES, default=tuple(turns.MODES))
    parser.add_argument("--batch", type=int, default=56, help="sequences a step (56)")
    parser.add_argument("--small", action="store_true", help="models and products small enough for a CPU")
    arguments = parser.parse_args()
    rows, peaks = [], []
    for mode in arguments.mode:
        with jax.default_matmul_precision(turns.MODES[mode]):
            peak = peak_rate(mode, 512 if arguments.small else 8192, arguments.rounds)
            peaks.append(f"{mode} {peak / 1e12:.2f}")
            for path in arguments.config:
                rows.append(row(path, mode, peak, arguments))
                print(" | ".join(rows[-1]), flush=True)
    on = f"{jax.devices()[0].device_kind}, jax {version('jax')}, batch {arguments.batch}."
    on += f" A product's TFLOP/s: {', '.join(peaks)}."
    head = ["config", "mode", "ms a step", "step / sum of parts", "tokens/s", "TFLOP/s", "of the product's"]
    tables.publish("utilization", f"{on}\n\n{tables.markdown(head, rows)}", arguments.write)


if __name__ == "__main__":
    main()
