"""Common parts of all data sets: splits, access to files, checks of options, and batches by number.

Training batches form a `grain.MapDataset` whose element i is the batch of step i, a function of i and the seed alone. A run
therefore resumes from the number of its step, without any iterator state.
"""

import contextlib
import functools
import os
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import grain
import numpy as np

from deq_flax.errors import UserError
from deq_flax.untrusted.files import printable

SPLITS = ("train", "valid", "test")
ON_DISK = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test"}
"""The split for each name used in file and folder names."""

READ_AHEAD = 4
"""Batches that `iterate` prepares while the current one is in use."""

Batch = dict[str, np.ndarray]
"""Arrays by name, each with the batch as its leading axis."""

Split = TypeVar("Split")


@dataclass(frozen=True, kw_only=True)
class Splits(Generic[Split]):
    """The three parts of a data set."""

    train: Split
    valid: Split
    test: Split

    def split(self, name: str) -> Split:
        """The split 'train', 'valid' or 'test'. Raises UserError for another name."""
        if name not in SPLITS:
            raise UserError(f"no split {name!r}; known: {', '.join(SPLITS)}")
        return getattr(self, name)


class Examples(Protocol):
    """A finite set of examples, read as batches of any subset."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, random: np.random.Generator | None) -> Batch:
        """Read the examples at `indices` (B,) as one batch.

        Args:
            indices: integers from 0 to `len(self)` - 1.
            random: draws the augmentation; None in evaluation: no augmentation.

        Returns:
            Arrays by name. One is `mask`, (B,) float32: 0 for an example that could not be read and must not count.
        """
        ...


def train_dataset(examples: Examples, batch_size: int, *, seed: int, rows: slice | None = None) -> grain.MapDataset[Batch]:
    """Endless shuffled and augmented batches; the element at `step` is the batch of that training step.

    Each epoch has its own order and omits the examples that do not fill a batch. One generator, Grain's for that step, draws
    the augmentation of a whole batch.

    The order is a NumPy permutation rather than Grain's `shuffle`, a four-round cipher over blocks of 2^16 indices: the orders
    of 45,000 to 60,000 examples are correlated (0.05 to 0.1 between neighbors, up to 0.2 between epochs), a data set of 1,500
    takes 30 us an example, and `batch` adds 10 us of Python for each. A slice of a permutation is a whole batch at once.

    Args:
        examples: the examples, at least one batch.
        batch_size: B.
        seed: determines orders and augmentation; not negative.
        rows: the rows of each batch to return; None: all. All rows are read, since their augmentation is drawn together.

    Raises:
        UserError: there are fewer examples than a batch.
    """
    if len(examples) < batch_size:
        raise UserError(f"there are {len(examples)} training examples, fewer than a batch: lower data.batch_size {batch_size}")
    batches_per_epoch = len(examples) // batch_size
    kept = rows or slice(None)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(examples))

    def choose(step: int, number: int) -> np.ndarray:
        return order(step // batches_per_epoch)[number * batch_size : (number + 1) * batch_size]

    def read(indices: np.ndarray, random: np.random.Generator) -> Batch:
        return {name: x[kept] for name, x in examples.read(indices, random).items()}

    numbers = grain.MapDataset.range(batches_per_epoch).seed(seed)
    return numbers.repeat().map_with_index(choose).random_map(read)


def repeat_batches(batches: grain.sources.RandomAccessDataSource[Batch]) -> grain.MapDataset[Batch]:
    """Endless repetition of `batches` in order; the element at `step` is batch `step % len(batches)`."""
    return grain.MapDataset.source(batches).repeat()


def iterate(dataset: grain.MapDataset[Batch], start: int = 0) -> Iterator[Batch]:
    """Iterate over elements `start`, `start` + 1, ... of `dataset`; a background thread prepares a few in advance."""
    # One thread: more of them contend for the GIL, and the work is page faults and small copies.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
    return iter(dataset[start:].to_iter_dataset(options))


class EvalBatches:
    """Every example once, in order. The last batch is filled up with copies whose `mask` is 0.

    A plain sequence rather than a Grain dataset: an index past the end must raise an IndexError, not start another epoch, and
    each process reads only its own rows.

    Args:
        examples: the examples, at least one.
        batch_size: B.
        rows: the rows of each batch to read and return; None: all.
    """

    def __init__(self, examples: Examples, batch_size: int, rows: slice | None = None):
        self._examples, self._batch_size, self._rows = examples, batch_size, rows or slice(None)

    def __len__(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        indices = index % len(self) * self._batch_size + np.arange(self._batch_size)[self._rows]
        last = len(self._examples) - 1
        present = indices[indices <= last]
        batch = self._examples.read(present if len(present) else np.array([last]), None)
        missing = len(indices) - len(batch["mask"])
        if missing:
            batch = {name: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for name, x in batch.items()}
        batch["mask"] = np.where(indices <= last, batch["mask"], 0).astype(np.float32)
        return batch


def check_least(options: object, least: int, *names: str) -> None:
    """Raise UserError if one of these fields of a `data` section is below `least`."""
    for name in names:
        if getattr(options, name) < least:
            raise UserError(f"data.{name} must be at least {least}, not {getattr(options, name)}")


def data_path(path: str, wanted: str) -> Path:
    """The existing file or folder that `data.path` names, with '~' expanded.

    Args:
        path: the value of `data.path`.
        wanted: description of what the path must name, for the message.

    Raises:
        UserError: `path` is empty, does not exist or cannot be accessed.
    """
    if not path:
        raise UserError(f"data.path is not set: {wanted}")
    place = Path(os.path.expanduser(path))
    with readable(place):
        if not place.exists():
            raise UserError(f"data.path {place} does not exist: {wanted}")
    return place


@contextlib.contextmanager
def readable(label: object) -> Generator[None]:
    """Turn errors of reading a file or zip file into a UserError of one line that names it as `label`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {printable(str(label))}: {error.strerror or error}") from error
    except _ZIP_DAMAGE as error:
        what = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{printable(str(label))} is damaged or not a zip file that can be read ({what}); get it again"
        ) from error


_ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    MemoryError,
)
"""Exceptions that `zipfile` raises for damaged files."""


def check_member(info: zipfile.ZipInfo, limit: int) -> None:
    """Check what a zip file states about a member before it is opened.

    Raises:
        BadZipFile: the member has more than `limit` bytes, is encrypted, or is compressed by another method than deflate, the
            only one that `zipfile` decompresses within bounded memory.
    """
    if info.flag_bits & 1:
        raise zipfile.BadZipFile("it is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"it is compressed by method {info.compress_type}: compress it by deflate")
    if info.file_size > limit:
        raise zipfile.BadZipFile(f"it states {info.file_size} bytes of content: at most {limit} are read")
