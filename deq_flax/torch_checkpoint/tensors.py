"""Tensors in a file: their types and shapes are known before any of their bytes are read."""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deq_flax.errors import UserError
from deq_flax.untrusted.files import listed, shown

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_NDIM = 8
MAX_SIZE = 1 << 40
"""Largest product of a tensor's nonzero sizes."""
MAX_TENSORS = 1 << 16
MAX_NAME = 1000
"""Most characters of a tensor's name."""
EXPANSION = 8
EXPANSION_FLOOR, EXPANSION_CEILING = 1 << 20, 1 << 29
"""All different views together may have twice the bytes of their storages; or EXPANSION times, plus EXPANSION_FLOOR, as long as
that is at most EXPANSION_CEILING more than the storages have."""


class FormatError(Exception):
    """Raised for a file that cannot be read; the message says what is wrong, without the name of the file."""


@dataclass(frozen=True)
class Storage:
    """A run of elements of one type somewhere in a file."""

    dtype: np.dtype
    numel: int
    read: Callable[[], np.ndarray]
    """Returns the bytes, (numel * itemsize,) uint8, in native byte order. Raises exceptions that `readable` handles."""

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __setstate__(self, state: Any) -> None:
        raise FormatError("sets attributes on a storage")


class Tensor:
    """A strided view of a storage.

    Args:
      storage: holds the elements.
      offset: index of the view's first element in the storage.
      shape: sizes of the view's axes.
      strides: elements between neighbors along each axis.

    Raises:
      FormatError: the view does not lie within the storage.
    """

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        numbers = (offset, *shape, *strides)
        possible = all(type(x) is int and 0 <= x <= MAX_SIZE for x in numbers) and len(shape) == len(strides) <= MAX_NDIM
        if not possible or math.prod(n for n in shape if n) > MAX_SIZE:
            raise FormatError(f"holds a tensor of impossible geometry (shape {listed(shape)}; strides {listed(strides)})")
        end = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1 if 0 not in shape else offset
        if end > storage.numel:
            raise FormatError(f"holds a tensor of shape {list(shape)} that reaches beyond its {storage.numel} elements")
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def __setstate__(self, state: Any) -> None:
        raise FormatError("sets attributes on a tensor")

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The elements, a read-only array backed by storage read for this call. Errors are those of `Storage.read`."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        raw = self.storage.read()
        elements = raw != 0 if self.dtype == np.bool_ else raw.view(self.dtype)
        steps = [step * self.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, steps, writeable=False)

    def same_elements(self, other: "Tensor") -> bool:
        """Return True if both are the same view of the same storage."""
        return self.storage is other.storage and (self.offset, self.shape, self.strides) == (
            other.offset,
            other.shape,
            other.strides,
        )


def contiguous(storage: Storage, shape: tuple[int, ...], *, column_major: bool = False) -> Tensor:
    """The tensor that fills `storage` in row-major or column-major order."""
    strides, step = [], 1
    for n in shape if column_major else reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return Tensor(storage, 0, shape, tuple(strides if column_major else reversed(strides)))


def read_at(path: Path, start: int, n_bytes: int) -> np.ndarray:
    """The bytes of a file from offset `start`, (n_bytes,) uint8. FormatError: there are fewer."""
    out = np.empty(n_bytes, np.uint8)
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(out.data) != n_bytes:
            raise FormatError("is cut off")
    return out


def swap_bytes(raw: np.ndarray, itemsize: int) -> np.ndarray:
    """The bytes of elements of `itemsize` bytes in the other byte order."""
    return raw.reshape(-1, itemsize)[:, ::-1].copy().reshape(-1)


def check_total(tensors: Mapping[str, Tensor]) -> None:
    """Raise FormatError for too many tensors or too long names, or if they state many more bytes than their storages hold."""
    if len(tensors) > MAX_TENSORS:
        raise FormatError(f"holds {len(tensors)} tensors; at most {MAX_TENSORS} are read")
    long = [name for name in tensors if len(name) > MAX_NAME]
    if long:
        raise FormatError(f"holds a tensor whose name has {len(long[0])} characters ({shown(long[0])})")
    views = {(id(x.storage), x.offset, x.shape, x.strides): x for x in tensors.values()}.values()
    held = sum({id(tensor.storage): tensor.storage.nbytes for tensor in views}.values())
    stated = sum(tensor.nbytes for tensor in views)
    if stated > max(2 * held, min(EXPANSION * held + EXPANSION_FLOOR, held + EXPANSION_CEILING)):
        raise FormatError(f"states {stated} bytes of tensors, but holds {held}")


@contextlib.contextmanager
def readable(path: Path) -> Generator[None]:
    """Turn the errors of reading a file into a UserError of one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except FormatError as error:
        raise UserError(f"{path} {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except MemoryError as error:
        raise UserError(f"{path} does not fit into memory") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
