"""Evaluation of the DEQ-Transformer with longer and longer memory, beside the same in PyTorch.

    pip install -r requirements.txt -r requirements-bench.txt
    python -m benchmarks.evaluate [--rounds 9] [--write]

Sizes as in train_step.py: 8 x 64 tokens a segment, 12 evaluations at tolerance 0; memory full. The limit is 12 times f in a
loop at that memory, and what is outside of the solve: a segment with one evaluation, less that evaluation.
"""

import tempfile
from collections.abc import Callable

from benchmarks import tables, training, turns

LIBRARIES = {"deq_flax": "jax", "torchdeq": "torchdeq"}
MEMORIES = (64, 150, 480)
BATCH, LENGTH, STEPS = 8, 64, 12
CASES = tuple(f"{part} {memory}" for memory in MEMORIES for part in ("f", "segment of one evaluation", "segment"))


def ours() -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    programs = {}
    for memory in MEMORIES:
        with tempfile.TemporaryDirectory() as folder:
            changes = training.timing_text(folder, STEPS) | {"model.mem_len": memory}
            it = training.Training(training.resolved("configs/wt103.py", changes))
        full = it.task.fresh_carry(it.run.model, BATCH)._replace(length_B=jnp.full((BATCH,), memory, jnp.int32))
        controls = it.task.controls(0)

        def segment(limit: int, it=it, full=full, controls=controls) -> Callable:
            carry, limits = jax.tree.map(jnp.copy, full), controls._replace(max_steps=np.int32(limit))

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


def table(times: turns.Times) -> str:
    names = [name for name in LIBRARIES if (name, CASES[0]) in times]
    rows = []
    for memory in MEMORIES:
        for name in names:
            f, one, segment = (times[name, f"{part} {memory}"] for part in ("f", "segment of one evaluation", "segment"))
            limit = f + one - f / STEPS
            numbers = [f"{1e3 * f:.0f}", f"{1e3 * segment:.0f}", f"{segment / limit:.2f}", f"{BATCH * LENGTH / segment:,.0f}"]
            rows.append([str(memory), name, *numbers])
    return tables.markdown(["memory", "library", f"{STEPS} x f, ms", "segment, ms", "segment / limit", "tokens/s"], rows)


def main() -> None:
    parser = tables.parser(__doc__, rounds=9)
    parser.add_argument("--worker", help="used by the command itself")
    arguments = parser.parse_args()
    if arguments.worker:
        return turns.work(torch_peer() if arguments.worker == "torchdeq" else ours())
    times, facts = turns.measure(__file__, LIBRARIES, CASES, arguments.rounds)
    on = turns.machine([LIBRARIES[name] for name in facts], facts["deq_flax"])
    tables.publish("evaluate", f"{on}. Medians.\n\n{table(times)}", arguments.write)


if __name__ == "__main__":
    main()
