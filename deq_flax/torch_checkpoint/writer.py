"""Write a state_dict that `torch.load` reads: the zip format, with a pickle assembled here."""

import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deq_flax.errors import UserError
from deq_flax.torch_checkpoint.restricted_pickle import STORAGES

_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
ROOT = "archive"


def write_state_dict(path: str | Path, tensors: Iterable[tuple[str, str, np.ndarray]]) -> None:
    """Write (name, storage, array) triples; arrays that name the same storage are stored once and must be equal.

    The same triples give the same bytes. The file appears only once it is complete.

    Raises:
      UserError: the file cannot be written.
    """
    path = Path(path)
    entries: list[tuple[str, int, np.ndarray]] = []
    keys: dict[str, int] = {}
    storages: list[np.ndarray] = []
    for name, storage, array in tensors:
        key = keys.setdefault(storage, len(storages))
        if key == len(storages):
            storages.append(array)
        entries.append((name, key, array))
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            _write(archive, "data.pkl", _pickle(entries))
            _write(archive, "byteorder", b"little")
            for key, array in enumerate(storages):
                raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                _write(archive, f"data/{key}", raw.reshape(-1).view(np.uint8).data)
            _write(archive, "version", b"3\n")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _write(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"{ROOT}/{name}")  # with its default date of 1980, so that the same tensors give the same file
    info.file_size = len(content)
    with archive.open(info, "w") as stream:
        stream.write(content)


def _pickle(entries: Iterable[tuple[str, int, np.ndarray]]) -> bytes:
    """The pickle of an OrderedDict of tensors, in protocol 2."""
    parts = [b"\x80\x02", _EMPTY_ORDERED_DICT, b"("]
    for name, key, array in entries:
        parts += [_text(name), _tensor(key, array)]
    return b"".join([*parts, b"u."])


def _tensor(key: int, array: np.ndarray) -> bytes:
    """The instructions for `_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    strides = [1]
    for n in array.shape[:0:-1]:
        strides.insert(0, strides[0] * max(n, 1))
    storage_type = f"ctorch\n{_NAMES[array.dtype]}\n".encode()
    storage = [_text("storage"), storage_type, _text(str(key)), _text("cpu"), _number(array.size)]
    arguments = [
        _tuple(storage) + b"Q",
        _number(0),
        _tuple(map(_number, array.shape)),
        _tuple(map(_number, strides[: array.ndim])),
        b"\x89",
        _EMPTY_ORDERED_DICT,
    ]
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(arguments) + b"R"


def _tuple(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(x: int) -> bytes:
    if x < 1 << 31:
        return b"J" + struct.pack("<i", x)
    return b"\x8a\x08" + struct.pack("<q", x)
