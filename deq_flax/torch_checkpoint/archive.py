"""Zip files whose sizes are believed only as far as the file itself bears them out."""

import contextlib
import zipfile
from collections.abc import Generator
from pathlib import Path

import numpy as np

from deq_flax.torch_checkpoint.tensors import FormatError

MAX_RATIO = 100
MAX_FLOOR = 1 << 26
"""All entries together may state at most MAX_FLOOR + MAX_RATIO times the file's size, compressed or not."""
MAX_ENTRIES = 1 << 17
PIECE = 1 << 22


class Archive:
    """The entries of a zip file by name. Every read is checked against the entry's CRC.

    Raises, here and in every method:
      FormatError: it is damaged, encrypted, or states sizes that cannot be.
    """

    def __init__(self, path: Path):
        with _damage():
            self._zip = zipfile.ZipFile(path)
        self.sizes = {info.filename: info.file_size for info in self._zip.infolist()}
        """The bytes of every entry."""
        try:
            self._check(path.stat().st_size)
        except BaseException:
            self._zip.close()
            raise

    def close(self) -> None:
        self._zip.close()

    def head(self, name: str, n_bytes: int) -> bytes:
        """The first bytes of an entry, unchecked."""
        with _damage(), self._zip.open(name) as stream:
            return stream.read(n_bytes)

    def read(self, name: str, *, limit: int) -> bytes:
        """A small entry. FormatError if it is larger than `limit`."""
        if self._zip.getinfo(name).file_size > limit:
            raise FormatError(f"holds an entry {name!r} of more than {limit} bytes")
        return self.read_array(name).tobytes()

    def read_array(self, name: str, start: int = 0) -> np.ndarray:
        """The bytes of an entry from `start` on, (n,) uint8."""
        info = self._zip.getinfo(name)
        out = np.empty(info.file_size, np.uint8)
        done = 0
        with _damage(), self._zip.open(info) as stream:
            while piece := stream.read(PIECE):
                out[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                done += len(piece)
        if done != info.file_size:
            raise FormatError(f"is cut off within {name!r}")
        return out[start:]

    def _check(self, size: int) -> None:
        infos = self._zip.infolist()
        if len(infos) > MAX_ENTRIES or len(self.sizes) != len(infos):
            raise FormatError("is a zip file with too many entries, or two of the same name")
        if any(info.flag_bits & 1 for info in infos):
            raise FormatError("is an encrypted zip file")
        stored = sum(info.file_size for info in infos if info.compress_type == zipfile.ZIP_STORED)
        stated = sum(info.file_size for info in infos)
        if stored > size or stated > MAX_FLOOR + MAX_RATIO * size:
            raise FormatError(f"states {stated} bytes of content in a file of {size}: refused, and nothing was unpacked")


@contextlib.contextmanager
def _damage() -> Generator[None]:
    """`zipfile` raises errors of a dozen types when a file is damaged: whatever it stumbled over."""
    try:
        yield
    except (FormatError, OSError, MemoryError):
        raise
    except Exception as error:
        raise FormatError(f"is damaged ({str(error) or type(error).__name__})") from error
