"""Readers of .safetensors and .npz files."""

import io
import json
import math
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deq_flax.torch_checkpoint.archive import Archive
from deq_flax.torch_checkpoint.tensors import BFLOAT16, FormatError, Storage, Tensor, contiguous, read_at, swap_bytes

MAX_HEADER = 1 << 24
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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name. Layout: length of a JSON header (uint64), header, elements without gaps."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER, size - 8):
            raise FormatError("is damaged: its header is longer than the file, or than any of tensors")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FormatError("is damaged: its header is no JSON") from error
    if not isinstance(header, dict):
        raise FormatError("is damaged: its header is no JSON object")
    header.pop("__metadata__", None)
    start, tensors, places = 8 + length, {}, []
    for name, entry in header.items():
        dtype, shape, (begin, end) = _entry(name, entry)
        numel = math.prod(shape)
        if end - begin != numel * dtype.itemsize:
            raise FormatError(f"is damaged: {name} has {end - begin} bytes and should have {numel * dtype.itemsize}")
        places.append((begin, end))
        read = partial(read_at, path, start + begin, end - begin)
        tensors[name] = contiguous(Storage(dtype, numel, read), shape)
    edge = 0
    for begin, end in sorted(places):
        if begin != edge:
            raise FormatError("is damaged: its tensors overlap, or leave gaps")
        edge = end
    if start + edge != size:
        raise FormatError("is cut off, or has bytes left over at its end")
    return tensors


def read_npz(archive: Archive) -> dict[str, Tensor]:
    """The arrays of an .npz file by name. FormatError: it is damaged, or holds something else than numbers."""
    return {name.removesuffix(".npy"): _npy(archive, name) for name in archive.sizes}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"is damaged: the header of {name!r} makes no sense")
    kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in SAFETENSORS:
        raise FormatError(f"holds {name!r} as {kind!r}; known types: {', '.join(SAFETENSORS)}")
    for numbers in (shape, place):
        if not isinstance(numbers, list) or not all(type(x) is int and x >= 0 for x in numbers):
            raise FormatError(f"is damaged: the header of {name!r} makes no sense")
    if len(place) != 2:
        raise FormatError(f"is damaged: the header of {name!r} makes no sense")
    return SAFETENSORS[kind], tuple(shape), (place[0], place[1])


def _npy(archive: Archive, name: str) -> Tensor:
    """An array whose header alone has been read."""
    if not name.endswith(".npy"):
        raise FormatError(f"holds {name!r}: an .npz file holds .npy files")
    head = io.BytesIO(archive.head(name, 1 << 16))
    try:
        version = np.lib.format.read_magic(head)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, column_major, dtype = read_header(head)
    except Exception as error:  # of several types: the header is Python source, read as a literal
        raise FormatError(f"is damaged: {name!r} has no header of an array") from error
    if dtype.hasobject or dtype.kind not in "fiub":
        raise FormatError(f"holds {name!r} as {dtype}: arrays of objects are refused, and only numbers are read")
    start, numel = head.tell(), math.prod(shape)
    if archive.sizes[name] != start + numel * dtype.itemsize:
        raise FormatError(f"is damaged: {name!r} is not of the size that its header states")
    native = dtype.newbyteorder("=")

    def read() -> np.ndarray:
        raw = archive.read_array(name, start)
        return raw if dtype.isnative else swap_bytes(raw, dtype.itemsize)

    return contiguous(Storage(native, numel, read), tuple(shape), column_major=column_major)
