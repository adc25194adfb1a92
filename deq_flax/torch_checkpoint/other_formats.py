"""Readers of .safetensors and .npz files."""

import contextlib
import io
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from deq_flax.torch_checkpoint.archive import Archive
from deq_flax.torch_checkpoint.tensors import BFLOAT16, FormatError, Storage, Tensor, contiguous, swap_bytes
from deq_flax.untrusted.files import shown

SAFETENSORS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The types that are read, by their names in .safetensors files."""

MAX_HEADER = 1 << 24
"""Most bytes of the header of a .safetensors file; a tensor takes about 100."""
MAX_ARRAYS = 1 << 14
"""Most arrays in an .npz file: 100 us are needed to read the header of each."""


def read_safetensors(path: Path, files: contextlib.ExitStack) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name. It stays open until `files` is closed.

    Elements are read by `pread`, not through a memory map: pages of a map count as memory in use, and if the file is truncated
    meanwhile, access to them ends the process.

    Raises:
      FormatError: the file is damaged, or holds a type that is not known here.
    """
    with path.open("rb") as raw:
        n_bytes = int.from_bytes(raw.read(8), "little")
    if n_bytes > MAX_HEADER:
        raise FormatError(f"has a header of {n_bytes} bytes, or a damaged one: header too large")
    with _one_error():
        file = files.enter_context(safe_open(path, framework="numpy", backend="pread"))
        return {name: _tensor(file, name) for name in file.offset_keys()}


def read_npz(archive: Archive) -> dict[str, Tensor]:
    """The arrays of an .npz file by name. FormatError: it is damaged, or holds something else than numbers."""
    if len(archive.sizes) > MAX_ARRAYS:
        raise FormatError(f"holds {len(archive.sizes)} arrays; at most {MAX_ARRAYS} are read")
    return {name.removesuffix(".npy"): _npy(archive, name) for name in archive.sizes}


def _tensor(file: Any, name: str) -> Tensor:
    entry = file.get_slice(name)
    kind, shape = entry.get_dtype(), tuple(entry.get_shape())
    if kind not in SAFETENSORS:
        raise FormatError(f"holds {shown(name)!r} as {shown(kind)!r}; known types: {', '.join(SAFETENSORS)}")

    def read() -> np.ndarray:
        with _one_error():
            return file.get_tensor(name).reshape(-1).view(np.uint8)

    return contiguous(Storage(SAFETENSORS[kind], math.prod(shape), read), shape)


@contextlib.contextmanager
def _one_error() -> Generator[None]:
    """Turn the package's exception into FormatError, with a message of one line."""
    try:
        yield
    except SafetensorError as error:
        raise FormatError(f"is damaged or cut off ({' '.join(str(error).split())[:160]})") from error


def _npy(archive: Archive, name: str) -> Tensor:
    """An array whose header alone has been read."""
    if not name.endswith(".npy"):
        raise FormatError(f"holds {shown(name)!r}: an .npz file holds .npy files")
    head = io.BytesIO(archive.head(name, 1 << 16))
    try:
        version = np.lib.format.read_magic(head)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_major, dtype = read_header(head)
    except Exception as error:  # any of several types: the header is Python source, read as a literal
        raise FormatError(f"is damaged: {shown(name)!r} has no header of an array") from error
    if dtype.hasobject or dtype.kind not in "fiub":
        raise FormatError(
            f"holds {shown(name)!r} as {shown(str(dtype))}: arrays of objects are refused, and only numbers are read"
        )
    start, numel = head.tell(), math.prod(shape)
    if archive.sizes[name] != start + numel * dtype.itemsize:
        raise FormatError(f"is damaged: {shown(name)!r} is not of the size that its header states")
    native = dtype.newbyteorder("=")

    def read() -> np.ndarray:
        raw = archive.read_array(name, start)
        return raw if dtype.isnative else swap_bytes(raw, dtype.itemsize)

    return contiguous(Storage(native, numel, read), tuple(shape), column_major=column_major)
