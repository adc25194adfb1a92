"""Tensors in a file, known by type and shape before any of their bytes are read."""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deq_flax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_NDIM = 8
EXPANSION = 8
"""The most elements that all tensors may have together, in multiples of what the file holds: views share storage."""
EXPANSION_FLOOR = 1 << 20


class FormatError(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class Storage:
    """A run of elements of one type somewhere in a file."""

    dtype: np.dtype
    numel: int
    read: Callable[[], np.ndarray]
    """Its (numel * itemsize,) uint8, in this machine's byte order. Raises FormatError or what `readable` turns into one."""

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __setstate__(self, state: Any) -> None:
        raise FormatError("sets attributes on a storage")


class Tensor:
    """A strided view of a storage.

    Args:
      storage: where the elements are.
      offset: of the first, in elements.
      shape, strides: of the view; strides in elements.

    Raises:
      FormatError: the view does not lie within the storage.
    """

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        numbers = (offset, *shape, *strides)
        if not all(type(x) is int and x >= 0 for x in numbers) or len(shape) != len(strides) or len(shape) > MAX_NDIM:
            raise FormatError(f"holds a tensor of impossible geometry (offset {offset}, shape {shape}, strides {strides})")
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
        """The elements, as a read-only view of storage read for this call. Errors as `Storage.read`."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        raw = self.storage.read()
        elements = raw != 0 if self.dtype == np.bool_ else raw.view(self.dtype)
        steps = [step * self.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, steps, writeable=False)

    def same_elements(self, other: "Tensor") -> bool:
        """Whether both are the very same view of the same storage."""
        return self.storage is other.storage and (self.offset, self.shape, self.strides) == (
            other.offset,
            other.shape,
            other.strides,
        )


def contiguous(storage: Storage, shape: tuple[int, ...], *, column_major: bool = False) -> Tensor:
    """The tensor that fills `storage` in order."""
    strides, step = [], 1
    for n in shape if column_major else reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return Tensor(storage, 0, shape, tuple(strides if column_major else reversed(strides)))


def read_at(path: Path, start: int, n_bytes: int) -> np.ndarray:
    """Bytes of a file, (n_bytes,) uint8."""
    out = np.empty(n_bytes, np.uint8)
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(out.data) != n_bytes:
            raise FormatError("is cut off")
    return out


def swap_bytes(raw: np.ndarray, itemsize: int) -> np.ndarray:
    """Elements in the other byte order."""
    return raw.reshape(-1, itemsize)[:, ::-1].copy().reshape(-1)


def check_total(tensors: Mapping[str, Tensor]) -> None:
    """FormatError when tensors pretend to be much more than their storages hold."""
    held = sum({id(tensor.storage): tensor.storage.nbytes for tensor in tensors.values()}.values())
    stated = sum(tensor.nbytes for tensor in tensors.values())
    if stated > EXPANSION * held + EXPANSION_FLOOR:
        raise FormatError(f"states {stated} bytes of tensors, but holds {held}")


@contextlib.contextmanager
def readable(path: Path) -> Generator[None]:
    """Turn what can be wrong with a file into one line that names it."""
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
