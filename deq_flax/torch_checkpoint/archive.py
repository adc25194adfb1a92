"""Zip archives, with limits on the sizes that an archive may state for its entries."""

import contextlib
import zipfile
from collections.abc import Generator
from pathlib import Path

import numpy as np

from deq_flax.torch_checkpoint.tensors import FormatError
from deq_flax.untrusted.files import shown

MAX_RATIO = 100
MAX_FLOOR, MAX_CEILING = 1 << 26, 1 << 29
"""The uncompressed sizes of all entries may sum to MAX_FLOOR + MAX_RATIO times the size of the file, in bytes, as long as that
is at most MAX_CEILING more than the file has; and to twice its size in any case."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods of torch.save and of NumPy, which are read. Others take memory that the archive does not state."""
MAX_ENTRIES = 1 << 17
CHUNK = 1 << 22
"""Bytes that are decompressed at a time."""


class Archive:
    """The entries of a zip file by name. A complete read of an entry is checked against its CRC.

    Raises:
      FormatError: the file is damaged, encrypted, or states impossible sizes. All methods raise it too.
    """

    def __init__(self, path: Path):
        with _one_error():
            self._zip = zipfile.ZipFile(path)
        self.sizes: dict[str, int] = {info.filename: info.file_size for info in self._zip.infolist()}
        """Uncompressed bytes by entry name."""
        try:
            self._check(path.stat().st_size)
        except BaseException:
            self._zip.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def head(self, name: str, n_bytes: int) -> bytes:
        """The first bytes of an entry, without the CRC check."""
        with _one_error(), self._zip.open(name) as stream:
            return stream.read(n_bytes)

    def read(self, name: str, *, limit: int) -> bytes:
        """The bytes of a small entry. FormatError if it is larger than `limit` bytes."""
        if self._zip.getinfo(name).file_size > limit:
            raise FormatError(f"holds an entry {shown(name)!r} of more than {limit} bytes")
        return self.read_array(name).tobytes()

    def read_array(self, name: str, start: int = 0) -> np.ndarray:
        """The bytes of an entry from offset `start` on, (n,) uint8."""
        info = self._zip.getinfo(name)
        out = np.empty(info.file_size, np.uint8)
        done = 0
        with _one_error(), self._zip.open(info) as stream:
            while chunk := stream.read(CHUNK):
                out[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
                done += len(chunk)
        if done != info.file_size:
            raise FormatError(f"is cut off within {shown(name)!r}")
        return out[start:]

    def _check(self, size: int) -> None:
        infos = self._zip.infolist()
        if len(infos) > MAX_ENTRIES or len(self.sizes) != len(infos):
            raise FormatError("is a zip file with too many entries, or two of the same name")
        if any(info.flag_bits & 1 for info in infos):
            raise FormatError("is an encrypted zip file")
        if any(info.compress_type not in METHODS for info in infos):
            raise FormatError("is a zip file of a compression that neither torch.save nor NumPy uses")
        stored = sum(info.file_size for info in infos if info.compress_type == zipfile.ZIP_STORED)
        stated = sum(info.file_size for info in infos)
        if stored > size or stated > max(2 * size, min(MAX_FLOOR + MAX_RATIO * size, size + MAX_CEILING)):
            raise FormatError(f"states {stated} bytes of content in a file of {size}: refused, and nothing was unpacked")


@contextlib.contextmanager
def _one_error() -> Generator[None]:
    """Turn the dozen exception types that `zipfile` raises for damaged files into FormatError."""
    try:
        yield
    except (FormatError, OSError, MemoryError):
        raise
    except Exception as error:
        raise FormatError(f"is damaged ({' '.join(str(error).split())[:160] or type(error).__name__})") from error
