"""Whether a device would wait for its host: what the loaders give in a second, and the host's time between two steps.

    python -m benchmarks.data [--rounds 9] [--write]

Loaders: batches as the trainer takes them, with each config's sizes and augmentation, from made-up data in files: random
words, and pictures of noise as CIFAR's binary files and as JPEG of 500 x 375. Headroom is their rate over that of training
steps here, of the smallest model of that kind at its full number of evaluations. Host: all that the training loop does from one
step to the next but wait for the device, with models of about 100 and 400 arrays.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import tables, training, turns

IMAGENET = {"model.num_classes": 2, "data.pictures": 0, "deq.pretrain_steps": 0}


def loaders() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, the config whose batches are taken, and one whose steps are."""
    with tempfile.TemporaryDirectory() as folder:
        words = training.text(folder, 267_735, 56 * 150 * 40 + 1)
        yield (
            "words, 56 x 150",
            training.resolved("configs/wt103.py", words),
            training.resolved("configs/wt103.py:tiny", words | {"model.vocab_size": 267_735, "deq.pretrain_steps": 0}),
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


def loading(config: dict[str, Any], rounds: int) -> float:
    """Seconds for each batch, in the long run: those read ahead at the start do not count."""
    from deq_flax.tasks import make_task

    batches = make_task(config).train_batches(0)
    for _ in range(8):
        next(batches)
    start = perf_counter()
    for _ in range(rounds):
        next(batches)
    return (perf_counter() - start) / rounds


def examples(config: dict[str, Any]) -> int:
    """Tokens or images of a batch."""
    return config["data"]["batch_size"] * config["data"].get("seq_len", 1)


def stepping(config: dict[str, Any], rounds: int) -> float:
    """Median seconds of a training step."""
    step = training.Training(config).stepping()
    step()
    times = []
    for _ in range(rounds):
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    return median(times)


class Waiting:
    """Takes the place of the training loop's log, and measures how long it waits for the device."""

    def __init__(self) -> None:
        self.waited, self.pending = 0.0, None

    def add(self, step: int, metrics: Any) -> None:
        import jax

        if self.pending is not None:
            start = perf_counter()
            jax.block_until_ready(self.pending)
            self.waited += perf_counter() - start
            jax.device_get(self.pending)
        self.pending = metrics

    def flush(self) -> None:
        pass


def host(blocks: int, rounds: int) -> tuple[int, float]:
    """Arrays among the parameters, and seconds of the host's own for each step."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        changes = training.timing_text(folder, 2) | {"model.blocks": blocks, "model.d_inner": 256}
        it = training.Training(training.resolved("configs/wt103.py", changes))
        batches, log = it.task.train_batches(0), Waiting()
        for number in range(5):
            it.run.dispatch(number, next(batches), log)
        seconds = []
        for number in range(5, 5 + 2 * rounds):
            before, start = log.waited, perf_counter()
            it.run.dispatch(number, next(batches), log)
            seconds.append(perf_counter() - start - (log.waited - before))
    return len(jax.tree.leaves(it.run.state.params)), median(seconds)


def main() -> None:
    parser = tables.parser(__doc__, rounds=9)
    arguments = parser.parse_args()
    rows = []
    for name, config, stepped in loaders():
        loaded = examples(config) / loading(config, arguments.rounds)
        trained = examples(stepped) / stepping(stepped, min(arguments.rounds, 3))
        rows.append([name, f"{loaded:,.0f}", f"{trained:,.1f}", f"{loaded / trained:,.0f}"])
    head = ["batches", "loader, tokens or images/s", "training, the same", "headroom"]
    hosts = [[str(n), f"{1e3 * seconds:.2f}"] for n, seconds in (host(6, arguments.rounds), host(25, arguments.rounds))]
    text = f"{turns.machine(['jax', 'grain', 'numpy'])}\n\n{tables.markdown(head, rows)}\n"
    text += tables.markdown(["arrays among the parameters", "host's milliseconds a step"], hosts)
    tables.publish("data", text, arguments.write)


if __name__ == "__main__":
    main()
