"""Throughput of the data loaders, and the host's time for each training step: whether a device would wait for its host.

    python -m benchmarks.data [--rounds 9] [--only loaders generators] [--write]

Loaders: batches as in training, with each config's sizes and augmentation, from synthetic data in files: random words, and
images of noise as CIFAR's binary files and as JPEG of 500 x 375. Headroom is their throughput over that of training steps on
this machine, of the smallest model of that kind at its full number of evaluations. Host: the work of the training loop for
each step besides waiting for the device, which overlaps with the device's work on the step before. Generators: puzzles a
second of processor time, with their solutions, before a run's test of equality; a run makes its puzzles once, at its start.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import tables, training, turns
from deq_flax.config import Config

SMALL = {
    "model.d_model": 16,
    "model.d_embed": 16,
    "model.n_head": 2,
    "model.d_head": 8,
    "model.d_inner": 16,
    "model.div_value": 2,
}
IMAGENET = {"model.num_classes": 2, "data.pictures": 0, "deq.pretrain_steps": 0}


def loaders() -> Iterator[tuple[str, Config, Config]]:
    """(name, config whose batches are loaded, config whose training steps are timed) of every case."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as small:
        words = training.text(folder, 267_735, 56 * 150 * 40 + 1)
        yield (
            "words, 56 x 150",
            training.resolved("configs/wt103.py", words),
            training.resolved("configs/wt103.py", training.timing_text(small, 12)),
        )
    with tempfile.TemporaryDirectory() as folder:
        pictures = training.images(folder, 1000) | {"data.augment": "crop_flip"}
        yield (
            "CIFAR-10, 128 cropped and mirrored",
            training.resolved("configs/cifar10.py:large", pictures),
            training.resolved("configs/cifar10.py:tiny", pictures | {"deq.pretrain_steps": 0}),
        )
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), 256)
        changes = IMAGENET | {"data.path": folder}
        yield (
            "JPEG, 128 decoded, cropped to 224 and mirrored",
            training.resolved("configs/imagenet.py:small", changes),
            training.resolved("configs/imagenet.py:small_reg", changes | {"data.batch_size": 2, "data.eval_batch_size": 2}),
        )


def photographs(folder: Path, count: int) -> None:
    """JPEG files of two classes, 500 x 375, as smooth and as large as photographs are (about 60 kB)."""
    random = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 4)):
        for i in range(number):
            path = folder / split / f"n{i % 2}" / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(random.integers(0, 256, (47, 63, 3), dtype=np.uint8))
            picture = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + random.normal(0, 6, (375, 500, 3))
            Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path, quality=90)


def loading(config: Config, rounds: int) -> float:
    """Seconds for each batch once the batches that are read ahead at the start are used up."""
    from deq_flax.config import make_task

    batches = make_task(config).train_batches(0)
    for _ in range(8):
        next(batches)
    start = perf_counter()
    for _ in range(rounds):
        next(batches)
    return (perf_counter() - start) / rounds


def examples(config: Config) -> int:
    """The number of tokens or images in a batch."""
    return config.data.batch_size * getattr(config.data, "seq_len", 1)


def stepping(config: Config, rounds: int) -> float:
    """The median time of a training step, in seconds."""
    step = training.Training(config).stepping()
    step()
    times = []
    for _ in range(rounds):
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    return median(times)


def host(blocks: int, rounds: int) -> list[str]:
    """A table row: numbers of arrays in the parameters and in the state, and the host's milliseconds for each part of a step.

    The device idles meanwhile, so that it takes no time from the host's cores. The dispatched program has the step's arguments
    and results, small arrays to which it adds 1: the CPU backend would begin to compute a real step on the caller's time.
    """
    import jax

    from deq_flax.devices.mesh import put_batch
    from deq_flax.train.evaluate import fetch

    def add_one(state: Any, batch: Any, scalars: Any, number: Any) -> Any:
        return jax.tree.map(lambda x: x + 1, state), batch["mask"].sum() + scalars.max_steps + number

    with tempfile.TemporaryDirectory() as folder:
        sizes = training.timing_text(folder, 2) | SMALL | {"model.blocks": blocks}
        it = training.Training(training.resolved("configs/wt103.py", sizes))
        state, metrics = it.run.train_step(it.run.state, *it.arguments, phase=it.phases.phase(0))
        shardings = (jax.tree.map(lambda x: x.sharding, state), None)
        dispatch = jax.jit(add_one, donate_argnums=0, out_shardings=shardings)
        batches, laps = it.task.train_batches(0), []
        for number in range(5 + 4 * rounds):
            lap = [perf_counter()]
            batch = next(batches)
            lap.append(perf_counter())
            batch = put_batch(it.run.devices, batch, it.task.batch_size)
            lap.append(perf_counter())
            _, scalars = it.phases.phase(number), it.phases.scalars(number)
            lap.append(perf_counter())
            state, _ = dispatch(state, batch, scalars, np.int32(number))
            lap.append(perf_counter())
            jax.block_until_ready(state)
            fresh = jax.block_until_ready(
                jax.tree.map(lambda x: x + 0, metrics)
            )  # an array caches its host copy once it has been read
            before = perf_counter()
            fetch(fresh)
            laps.append([*np.diff(lap), perf_counter() - before])
    spent = 1e3 * np.median(laps[5:], axis=0)
    counts = [len(jax.tree.leaves(tree)) for tree in (state.params, state)]
    return [*map(str, counts), *(f"{x:.2f}" for x in (*spent, spent.sum()))]


GENERATED: dict[str, dict[str, Any]] = {
    "prefix sums of 32 bits": {"name": "prefix_sums", "size": 32},
    "prefix sums of 512 bits": {"name": "prefix_sums", "size": 512},
    "products in A5, length 16": {"name": "a5", "size": 16},
    "products in S5, length 16": {"name": "s5", "size": 16},
    "mazes, side 11": {"name": "maze", "size": 11},
    "mazes, side 21": {"name": "maze", "size": 21},
    "Maze-Unique: side 30, paths of 100 to 140": {"name": "maze", "size": 30, "path_lengths": (100, 140)},
    "Sudoku 4 x 4": {"name": "sudoku", "size": 4},
    "Sudoku 4 x 4 with six clues": {"name": "sudoku", "size": 4, "clues": 6},
    "Sudoku 6 x 6": {"name": "sudoku", "size": 6},
    "Sudoku 9 x 9": {"name": "sudoku", "size": 9},
}
"""Row -> section `data` of a reasoning config."""


def generating(data: dict[str, Any], rounds: int) -> float:
    """Puzzles a second of processor time, the median of some chunks."""
    from deq_flax.data.puzzles.puzzles import CHUNK, PUZZLES, PuzzleOptions

    options, random, rates = PuzzleOptions(**data), np.random.default_rng(0), []
    generate = PUZZLES[options.name].generate
    assert generate is not None
    for _ in range(rounds):
        start = process_time()
        inputs, _ = generate(options, options.size, CHUNK, random)
        rates.append(len(inputs) / (process_time() - start))
    return median(rates)


def main() -> None:
    parser = tables.parser(__doc__, rounds=9)
    parser.add_argument("--only", nargs="+", choices=("loaders", "generators"), default=("loaders", "generators"))
    arguments = parser.parse_args()
    if "generators" in arguments.only:
        generated = [[name, f"{generating(data, arguments.rounds):,.0f}"] for name, data in GENERATED.items()]
        text = f"{turns.machine(['numpy'])}\n\n{tables.markdown(['puzzles', 'puzzles/s'], generated)}"
        tables.publish("generators", text, arguments.write)
    if "loaders" in arguments.only:
        measure_loaders(arguments)


def measure_loaders(arguments: Any) -> None:
    """Time loaders and the host, and publish the tables."""
    rows = []
    for name, config, stepped in loaders():
        loaded = examples(config) / loading(config, arguments.rounds)
        trained = examples(stepped) / stepping(stepped, min(arguments.rounds, 3))
        rows.append([name, f"{loaded:,.0f}", f"{trained:,.1f}", f"{loaded / trained:,.0f}"])
    head = ["batches", "loader, tokens or images/s", "training, the same", "headroom"]
    parts = [
        "arrays of parameters",
        "of the state",
        "next batch",
        "placing it",
        "phase, scalars",
        "dispatch",
        "metrics",
        "in all",
    ]
    hosts = [host(blocks, arguments.rounds) for blocks in (1, 6, 25)]
    text = f"{turns.machine(['jax', 'grain', 'numpy'])}\n\n{tables.markdown(head, rows)}\n"
    text += f"Milliseconds of the host for each step:\n\n{tables.markdown(parts, hosts)}"
    tables.publish("data", text, arguments.write)


if __name__ == "__main__":
    main()
