"""A training step of the multiscale DEQ on CIFAR-10's shapes: its time beside its limit, and its memory.

    python -m benchmarks.mdeq_step [--rounds 5] [--write benchmarks/mdeq_step.md]

Batch 8, float32, 8 evaluations each way at tolerance 0 with Broyden's method, random images. The limit is 8 times f and 8 times
its vector-Jacobian product, each alone in a loop, and the rest: stem, head, optimizer, which is timed as a step with one
unrolled evaluation, less that evaluation. Memory is what XLA's own analysis says that the step needs besides its arguments.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import turns
from deq_flax.task import Controls, Phase
from deq_flax.tasks import make_task
from deq_flax.train.loop import TrainOptions, Run
from deq_flax.train.mesh import make_mesh

BATCH, STEPS = 8, 8
CASES = ("f", "vjp", "step of one evaluation", "step")


def resolved(variant: str, folder: str, limit: int) -> dict:
    """The config as plain data, on random images that are written to `folder`."""
    spec = importlib.util.spec_from_file_location("cifar10", Path("configs") / "cifar10.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = random.integers(0, 256, (4 * BATCH, 1 + 3072)).astype(np.uint8)
        records[:, 0] %= 10
        (Path(folder) / f"{name}.bin").write_bytes(records.tobytes())
    config = module.get_config(variant).to_dict()
    config["data"] |= {"path": folder, "batch_size": BATCH, "eval_batch_size": BATCH, "augment": "none", "pictures": 0}
    config["deq"] |= {"tol": 0.0, "max_steps": limit, "backward_tol": 0.0, "backward_max_steps": limit}
    config["deq"] |= {"pretrain_steps": 0, "pretrain_layers": 1, "max_steps_jitter": 0}
    return config


def programs(variant: str, limit: int) -> tuple[dict[str, Callable], float]:
    """What is timed, by case, and the megabytes of the step."""
    with tempfile.TemporaryDirectory() as folder:
        config = resolved(variant, folder, limit)
        task = make_task(config)
        batch = next(task.train_batches(0))
    run = Run(task, TrainOptions(**config["train"]), make_mesh(data=1, fsdp=1, tensor=1), config["optimizer"])
    controls = Controls(max_steps=np.int32(limit), jacobian_weight=np.float32(0))
    arguments = (batch, controls, np.int32(0))

    def stepping(phase: Phase) -> Callable:
        def step():
            run.state, metrics = run.train_step(run.state, *arguments, phase=phase)
            jax.block_until_ready(metrics)

        return step

    model = task.build_model(nnx.Rngs(0))
    images = task.normalise(batch["images"])

    @jax.jit
    def f(images):
        f, z0 = model.equation(images, train=False)
        return jax.lax.fori_loop(0, limit, lambda _, z: f(z), z0)

    @jax.jit
    def vjp(images):
        f, z0 = model.equation(images, train=False)
        _, pullback = jax.vjp(f, z0)
        return jax.lax.fori_loop(0, limit, lambda _, v: pullback(v)[0], jax.tree.map(jnp.ones_like, z0))

    memory = run.train_step.lower(run.state, *arguments, phase=Phase()).compile().memory_analysis().temp_size_in_bytes
    cases = {
        "f": lambda: jax.block_until_ready(f(images)),
        "vjp": lambda: jax.block_until_ready(vjp(images)),
        "step of one evaluation": stepping(Phase(unrolled=True)),
        "step": stepping(Phase()),
    }
    return cases, memory / 1e6


def measure(variant: str, rounds: int) -> list[str]:
    """One row of the table."""
    cases, memory = programs(variant, STEPS)
    _, twice = programs(variant, 2 * STEPS)
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds + 1):  # the first round compiles
        for case in CASES:
            start = perf_counter()
            cases[case]()
            times[case].append(perf_counter() - start)
    t = {case: 1e3 * median(values[1:]) for case, values in times.items()}
    limit = t["f"] + t["vjp"] + t["step of one evaluation"] - (t["f"] + t["vjp"]) / STEPS
    numbers = [
        *(f"{t[case]:.0f}" for case in CASES),
        f"{limit:.0f}",
        f"{t['step'] / limit:.2f}",
        f"{memory:.0f}",
        f"{twice:.0f}",
    ]
    return [variant, *numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", help="also write the table to this file")
    arguments = parser.parse_args()
    head = ["cifar10", f"{STEPS} x f", f"{STEPS} x vjp", "step of one evaluation", "step", "the limit", "step / limit"]
    head += ["MB of the step", f"MB with {2 * STEPS} evaluations each way"]
    rows = [measure(variant, arguments.rounds) for variant in ("tiny", "large")]
    lines = [f"{turns.machine(['jax'])}. Milliseconds (medians) and megabytes.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        Path(arguments.write).write_text(text)


if __name__ == "__main__":
    main()
