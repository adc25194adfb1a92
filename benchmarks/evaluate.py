"""Evaluation of the DEQ-Transformer with memories of three lengths, in this library and in PyTorch.

    pip install -r requirements.txt -r requirements-bench.txt
    python -m benchmarks.evaluate [--rounds 9] [--mode bfloat16] [--write]

Sizes as in train_step.py: 8 x 64 tokens a segment, 12 evaluations at tolerance 0; memory full. The sum of parts is 12
evaluations of f in a loop at that memory, plus the work outside of the solve: a segment with one evaluation, less that
evaluation.
"""

import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import tables, training, turns

LIBRARIES = {"deq_flax": "jax", "torchdeq": "torchdeq"}
MEMORIES = (64, 150, 480)
BATCH, LENGTH, STEPS = 8, 64, 12
CASES = tuple(f"{part} {memory}" for memory in MEMORIES for part in ("f", "segment of one evaluation", "segment"))


def ours(dtype: str) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    programs = {}
    for memory in MEMORIES:
        with tempfile.TemporaryDirectory() as folder:
            changes = training.timing_text(folder, STEPS) | {"model.mem_len": memory, "model.dtype": dtype}
            it = training.Training(training.resolved("configs/wt103.py", changes))
        full = it.task.fresh_carry(it.run.model, BATCH)._replace(length_B=jnp.full((BATCH,), memory, jnp.int32))
        scalars = it.phases.scalars(0)

        def segment(limit: int, it=it, full=full, scalars=scalars) -> Callable:
            carry, limits = jax.tree.map(jnp.copy, full), scalars._replace(max_steps=np.int32(limit))

            def run() -> None:
                nonlocal carry
                state = it.run.state
                carry, metrics = it.run.eval_step(state.params, state.variables, it.batch, carry, limits)
                jax.block_until_ready(metrics)

            return run

        programs[f"f {memory}"] = it.programs()["f"]
        programs[f"segment of one evaluation {memory}"] = segment(1)
        programs[f"segment {memory}"] = segment(STEPS)
    return programs


def torch_peer() -> dict[str, Callable]:
    import torch

    from benchmarks import torch_programs, torch_transformer

    torch.set_num_threads(turns.THREADS)

    def segment(limit: int, memory: int) -> Callable:
        network, inputs, targets = torch_transformer.timed(limit, memory)
        network.eval()

        @torch.no_grad()
        def run() -> None:
            network.loss(network.solve(*inputs), targets)

        return run

    programs = {}
    for memory in MEMORIES:
        network, inputs, _ = torch_transformer.timed(STEPS, memory)
        programs[f"f {memory}"] = torch_programs.repeated(network, inputs, STEPS)
        programs[f"segment of one evaluation {memory}"] = segment(1, memory)
        programs[f"segment {memory}"] = segment(STEPS, memory)
    return programs


def programs(library: str, dtype: str) -> tuple[dict[str, Callable], dict[str, Any]]:
    return torch_peer() if library == "torchdeq" else ours(dtype), {}


def table(times: turns.Times, facts: turns.Facts) -> str:
    rows = []
    for memory in MEMORIES:
        for name in facts:
            f, one, segment = (times[name, f"{part} {memory}"] for part in ("f", "segment of one evaluation", "segment"))
            parts = f + one - f / STEPS
            numbers = [f"{1e3 * f:.0f}", f"{1e3 * segment:.0f}", f"{segment / parts:.2f}", f"{BATCH * LENGTH / segment:,.0f}"]
            rows.append([str(memory), name, *numbers])
    head = ["memory", "library", f"{STEPS} x f, ms", "segment, ms", "segment / sum of parts", "tokens/s"]
    return "Medians.\n\n" + tables.markdown(head, rows)


if __name__ == "__main__":
    turns.command("evaluate", __file__, __doc__, libraries=LIBRARIES, cases=CASES, programs=programs, table=table)
