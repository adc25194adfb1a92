"""Image files in a folder or a zip file: listed, decoded, and, if damaged, skipped and named.

Axes: H height, W width, C channels.
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
from typing import Any

import numpy as np
from PIL import Image

from deq_flax.data.text.files import readable
from deq_flax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
THREADS = min(16, os.cpu_count() or 1)
"""That decode: Pillow lets other threads run meanwhile."""

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
"""What Pillow raises, one time or another, for a file that is no whole image."""

_log = logging.getLogger("deq_flax")


class FileTree:
    """The files below a folder, or in a zip file, by names with '/' between the parts.

    Raises:
        UserError: there is nothing at `path`, or it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._lock = threading.Lock()
        with readable(path):
            if path.is_file():
                self._zip = zipfile.ZipFile(path)

    def names(self) -> list[str]:
        """All files, sorted."""
        if self._zip is not None:
            return sorted(name for name in self._zip.namelist() if not name.endswith("/"))
        with readable(self.path):
            return sorted(self._below(str(self.path), ""))

    def _below(self, folder: str, prefix: str) -> Iterator[str]:
        # Not Path.rglob, which takes minutes over a million files.
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from self._below(entry.path, f"{prefix}{entry.name}/")
                else:
                    yield prefix + entry.name

    def read(self, name: str) -> bytes:
        """The content of a file. Raises OSError or zipfile.BadZipFile."""
        if self._zip is None:
            return (self.path / name).read_bytes()
        with self._lock:
            return self._zip.read(name)

    def label(self, name: str) -> str:
        """The file's name for a person."""
        return f"{self.path}:{name}" if self._zip is not None else str(self.path / name)


def is_image(name: str) -> bool:
    """By its suffix; the resource forks that macOS puts into archives are none."""
    return name.lower().endswith(SUFFIXES) and not name.rsplit("/", 1)[-1].startswith("._")


class Damaged:
    """The files that could not be read: each is warned of once, by name, and more than `limit` of them end the run.

    Args:
        limit: how many are tolerated.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return sorted(self._reasons)

    def add(self, name: str, reason: object) -> None:
        """Raises UserError if there are too many now."""
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
    """An image whose size is known and whose pixels are not decoded yet. Raises one of many errors: see `decode_all`."""
    return Image.open(io.BytesIO(content))


def decode_all(
    names: Iterable[str], decode: Callable[[int, str], Any], damaged: Damaged, label: Callable[[str], str] = str
) -> list[Any]:
    """`decode(i, name)` of every name, in several threads; None where a file is damaged, which is noted.

    Raises:
        UserError: too many are damaged, or `decode` raised it.
    """

    def attempt(item: tuple[int, str]) -> Any:
        try:
            return decode(*item)
        except _DAMAGE as error:
            damaged.add(label(item[1]), error)
            return None

    return list(_pool().map(attempt, enumerate(names)))


def to_array(image: Image.Image, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8 of 3 colours, or of 1 shade of grey."""
    if channels == 1:
        return np.asarray(image.convert("L"))[:, :, None]
    return np.asarray(image.convert("RGB"))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """One for the process, made when it is first needed."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
