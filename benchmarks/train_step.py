"""Training steps of each model, in this library and in PyTorch, compared with the sum of their parts.

    pip install -r requirements.txt -r requirements-bench.txt
    python -m benchmarks.train_step [--rounds 9] [--mode bfloat16] [--write]

Transformer: 10,000 words, cutoffs 2000 and 5000, 256 features, 8 heads, 1024 inner features, sequence and memory 64, batch 8;
12 evaluations each way, Anderson forward and Broyden adjoint, Adam, clipping. Multiscale DEQ: CIFAR-10's `tiny` and `large`,
batch 8, 8 evaluations each way with Broyden's method. Tolerance 0. The sum of parts is defined in `training.py`.
"""

import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks import tables, training, turns
from benchmarks.training import CASES

LIBRARIES = {"deq_flax": "jax", "torchdeq": "torchdeq"}
MODELS = {"transformer": 12, "mdeq tiny": 8, "mdeq large": 8}
"""The numbers of evaluations of f in a forward solve, and of vector-Jacobian products in an adjoint solve."""


def ours(model: str, dtype: str) -> dict[str, Callable]:
    own = {"model.dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        if model == "transformer":
            config = training.resolved("configs/wt103.py", own | training.timing_text(folder, MODELS[model]))
        else:
            changes = own | {"data.batch_size": 8, "data.eval_batch_size": 8} | training.images(folder, 32)
            config = training.resolved(f"configs/cifar10.py:{model.split()[1]}", changes | training.exactly(MODELS[model]))
        return training.Training(config).programs()


def torch_peer(model: str) -> dict[str, Callable]:
    import torch

    from benchmarks import torch_mdeq, torch_programs, torch_transformer

    torch.set_num_threads(turns.THREADS)
    steps = MODELS[model]
    timed = torch_transformer.timed(steps) if model == "transformer" else torch_mdeq.timed(model.split()[1], steps)
    return torch_programs.programs(*timed, steps)


def programs(library: str, dtype: str) -> tuple[dict[str, Callable], dict[str, Any]]:
    def make(model: str) -> dict[str, Callable]:
        return torch_peer(model) if library == "torchdeq" else ours(model, dtype)

    return {f"{model}: {case}": program for model in MODELS for case, program in make(model).items()}, {}


def table(times: turns.Times, facts: turns.Facts) -> str:
    rows = []
    for model, steps in MODELS.items():
        for name in facts:
            seconds = {case: times[name, f"{model}: {case}"] for case in CASES}
            parts = training.sum_of_parts(seconds, steps, 2 if name == "deq_flax" else 1)
            peer = times.get(("torchdeq", f"{model}: step"))
            numbers = [
                *(f"{1e3 * seconds[case]:.0f}" for case in CASES),
                f"{1e3 * parts:.0f}",
                f"{seconds['step'] / parts:.2f}",
            ]
            rows.append([f"{model}, n = {steps}", name, *numbers, f"{seconds['step'] / peer:.2f}" if peer else ""])
    head = ["model", "library", "n x f", "n x vjp", *CASES[2:], "sum of parts", "step / sum", "step / torchdeq's"]
    return "Milliseconds (medians).\n\n" + tables.markdown(head, rows)


if __name__ == "__main__":
    turns.command(
        "train_step",
        __file__,
        __doc__,
        libraries=LIBRARIES,
        cases=tuple(f"{model}: {case}" for model in MODELS for case in CASES),
        programs=programs,
        table=table,
    )
