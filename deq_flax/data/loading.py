"""Examples as whole batches by number, for training epoch after epoch and for evaluation in order.

Batch i of training belongs to epoch i // (batches in an epoch); an epoch's order and the augmentation of each of its batches
come from generators seeded by (seed, epoch) and (seed, epoch, number in the epoch). So a run resumes by the number of its step.
"""

from typing import Protocol

import numpy as np

from deq_flax.errors import UserError

ENDLESS = 2**62
"""The length of what has no end; Grain wants one."""


class Examples(Protocol):
    """What there is to learn from, or to be scored on."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, random: np.random.Generator | None) -> dict[str, np.ndarray]:
        """The examples at `indices` as one batch: arrays by name, with the batch as leading axis.

        `random` decides their augmentation; None, in evaluation, is none. Among the arrays is `mask`, (B,) float32: 0 where an
        example could not be read and must not count.
        """
        ...


class TrainBatches:
    """Batches 0, 1, ... without end. Every epoch has an order of its own, and leaves out the examples that fill no batch.

    Args:
        examples: at least one batch of them.
        batch_size: B.
        seed: decides orders and augmentation.
        rows: of the batch, the only ones to give; None: all. All are read, since augmentation is drawn for a whole batch.

    Raises:
        UserError: there are fewer examples than a batch.
    """

    def __init__(self, examples: Examples, batch_size: int, seed: int, rows: slice | None = None):
        if len(examples) < batch_size:
            raise UserError(
                f"there are {len(examples)} training examples, fewer than a batch: lower data.batch_size {batch_size}"
            )
        self._examples, self._batch_size, self._seed, self._rows = examples, batch_size, seed, rows or slice(None)
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    @property
    def batches_per_epoch(self) -> int:
        return len(self._examples) // self._batch_size

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, number = divmod(index, self.batches_per_epoch)
        chosen = self._epoch_order(epoch)[number * self._batch_size : (number + 1) * self._batch_size]
        # Counted from 1: NumPy takes (seed, epoch, 0) for (seed, epoch), which decides the order.
        batch = self._examples.read(chosen, np.random.default_rng((self._seed, epoch, number + 1)))
        return {name: x[self._rows] for name, x in batch.items()}

    def _epoch_order(self, epoch: int) -> np.ndarray:
        known, order = self._order
        if known != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._examples))
            self._order = (epoch, order)  # one assignment: another thread sees the old pair or the new
        return order


class EvalBatches:
    """Every example once, in order. The last batch is filled up with copies whose `mask` is 0.

    Args:
        examples: at least one.
        batch_size: B.
        rows: of the batch, the only ones to read; None: all.
    """

    def __init__(self, examples: Examples, batch_size: int, rows: slice | None = None):
        self._examples, self._batch_size, self._rows = examples, batch_size, rows or slice(None)

    def __len__(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        indices = index % len(self) * self._batch_size + np.arange(self._batch_size)[self._rows]
        last = len(self._examples) - 1
        own = indices[indices <= last]
        batch = self._examples.read(own if len(own) else indices[:1] * 0 + last, None)
        missing = len(indices) - len(batch["mask"])
        if missing:
            batch = {name: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for name, x in batch.items()}
        batch["mask"] = np.where(indices <= last, batch["mask"], 0).astype(np.float32)
        return batch
