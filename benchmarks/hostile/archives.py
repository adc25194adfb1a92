"""Zip files that `zipfile` itself would not write."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

METHODS = {"bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}


def write_zip(path: Path, contents: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def write_bomb(path: Path, contents: Mapping[str, bytes], bomb: str, size: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """`contents` and an entry of `size` zeros, about a thousandth of it on disk."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        with archive.open(bomb, "w", force_zip64=True) as stream:
            for start in range(0, size, 1 << 22):
                stream.write(bytes(min(1 << 22, size - start)))
    return path


def patched(path: Path, *, method: int | None = None, flags: int | None = None, size: int | None = None) -> Path:
    """The zip file with another compression method, other flags, or another uncompressed size stated for every entry."""
    data = bytearray(path.read_bytes())
    for mark, places in ((b"PK\x03\x04", (8, 6, 22)), (b"PK\x01\x02", (10, 8, 24))):
        at = data.find(mark)
        while at >= 0:
            for form, place, value in zip(("<H", "<H", "<I"), places, (method, flags, size), strict=True):
                if value is not None:
                    struct.pack_into(form, data, at + place, value)
            at = data.find(mark, at + 4)
    path.write_bytes(data)
    return path
