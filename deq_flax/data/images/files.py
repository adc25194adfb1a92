"""Image files in a folder or a zip file: listing, decoding in threads, and skipping of damaged ones.

Axes: H height, W width.
"""

import functools
import io
import logging
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from deq_flax.data.loading import readable
from deq_flax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
THREADS = min(16, os.cpu_count() or 1)
"""Threads that decode; Pillow releases the GIL meanwhile."""

_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
"""Exceptions that Pillow and zipfile raise for damaged files."""

_log = logging.getLogger("deq_flax")

Decoded = TypeVar("Decoded")


class FileTree:
    """The files below a folder or in a zip file, by names with '/' between the parts.

    Args:
        path: the folder or zip file.

    Raises:
        UserError: a zip file at `path` cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._lock = threading.Lock()
        with readable(path):
            if path.is_file():
                self._zip = zipfile.ZipFile(path)

    def names(self) -> list[str]:
        """The names of all files, sorted. UserError: the folder cannot be read."""
        if self._zip is not None:
            return sorted(name for name in self._zip.namelist() if not name.endswith("/"))
        with readable(self.path):
            return sorted(self._below(str(self.path), ""))

    def _below(self, folder: str, prefix: str) -> Iterator[str]:
        # Path.rglob takes minutes for a million files.
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from self._below(entry.path, f"{prefix}{entry.name}/")
                else:
                    yield prefix + entry.name

    def read(self, name: str) -> bytes:
        """Read the content of a file. Raises OSError or zipfile.BadZipFile."""
        if self._zip is None:
            return (self.path / name).read_bytes()
        with self._lock:
            return self._zip.read(name)

    def label(self, name: str) -> str:
        """The full name of a file, for messages."""
        return f"{self.path}:{name}" if self._zip is not None else str(self.path / name)


def is_image(name: str) -> bool:
    """Decide by the suffix of a name; the resource forks that macOS puts into archives are not images."""
    return name.lower().endswith(SUFFIXES) and not name.rsplit("/", 1)[-1].startswith("._")


class DamagedFiles:
    """Record of the files that could not be read. Each is logged once as a warning; more than `limit` raise an error.

    Args:
        limit: the number of damaged files that are tolerated.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The full names of the files, sorted."""
        return sorted(self._reasons)

    def add(self, name: str, reason: object) -> None:
        """Record a file. Raises UserError if there are more than `limit` now."""
        with self._lock:
            if name in self._reasons:
                return
            self._reasons[name] = " ".join(str(reason).split())
            count = len(self._reasons)
        _log.warning("skipped the damaged image %s (%s); %d so far", name, self._reasons[name], count)
        if count > self._limit:
            listed = ", ".join(self.names[:5]) + (" ..." if count > 5 else "")
            raise UserError(
                f"{count} images are damaged ({listed}): get them again or delete them, or raise data.max_damaged {self._limit}"
            )


def open_image(content: bytes) -> Image.Image:
    """Open an image, whose pixels are decoded on first use. Raises any of the errors that `decode_all` handles."""
    return Image.open(io.BytesIO(content))


def decode_all(
    names: Iterable[str], decode: Callable[[int, str], Decoded], damaged: DamagedFiles, label: Callable[[str], str] = str
) -> list[Decoded | None]:
    """Call `decode(i, name)` for every name, in several threads.

    Args:
        names: the names, in order.
        decode: may raise any error of Pillow or zipfile for a damaged file.
        damaged: records damaged files.
        label: converts a name to one for messages.

    Returns:
        The results in order; None for a damaged file.

    Raises:
        UserError: too many files are damaged, or `decode` raised it.
    """

    def attempt(item: tuple[int, str]) -> Decoded | None:
        try:
            return decode(*item)
        except _DAMAGE as error:
            damaged.add(label(item[1]), error)
            return None

    return list(_pool().map(attempt, enumerate(names)))


def to_array(image: Image.Image) -> np.ndarray:
    """Convert to (H, W, 3) uint8."""
    return np.asarray(image.convert("RGB"))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The thread pool of the process, created on first use."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
