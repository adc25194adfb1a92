"""Image files in a folder or a zip file: listing, decoding in threads, and skipping of damaged ones.

Axes: H height, W width.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import re
import threading
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from deq_flax.data.loading import check_member, readable
from deq_flax.errors import UserError
from deq_flax.untrusted.files import printable, read_bytes

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
THREADS = min(16, os.cpu_count() or 1)
"""Threads that decode; Pillow releases the GIL meanwhile."""

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")
"""Formats that are decoded, by Pillow's names. Some of its other formats, such as PostScript, start programs."""
MAX_BYTES = 1 << 28
"""Largest size of an encoded image."""
MAX_PIXELS, LARGE = 1 << 26, 1 << 24
"""Most pixels of an image; and number of pixels above which images are decoded one at a time."""
_PPM_HEADER = re.compile(rb"P[1-6](?:\s+(?:#[^\n]*\n\s*)*[0-9]{1,9}){2,3}\s")
"""Header of a PPM file, of bounded length: Pillow reads it byte by byte, however long it is."""
MAX_PLAIN_BYTES = 1 << 22
"""Largest size of a PPM file whose pixels are decimal text, which takes Pillow a second for each megabyte."""

_OUTSIDE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of the machine, which say nothing about the file."""

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
            return sorted(self._below())

    def _below(self) -> Iterator[str]:
        # Path.rglob takes minutes for a million files. Links to a folder that is being walked are not followed.
        left: list[tuple[str, str, tuple[str, ...]]] = [(str(self.path), "", (os.path.realpath(self.path),))]
        while left:
            folder, prefix, walked = left.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    inner = walked
                    if entry.is_symlink():
                        real = os.path.realpath(entry.path)
                        inner = (*walked, os.path.realpath(folder), real)
                        if any(f"{other}/".startswith(f"{real}/") for other in inner[:-1]):
                            continue
                    if _is_folder(entry):
                        left.append((entry.path, f"{prefix}{entry.name}/", inner))
                    else:
                        yield prefix + entry.name

    def read(self, name: str) -> bytes:
        """Read the content of a file. Raises OSError or one of the errors of zipfile; see `decode_all`."""
        if self._zip is None:
            return read_bytes(self.path / name, MAX_BYTES)
        with self._lock:
            info = self._zip.getinfo(name)
            check_member(info, MAX_BYTES)
            return self._zip.read(info)

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
            self._reasons[name] = " ".join(str(reason).split())[:160]
            count = len(self._reasons)
        _log.warning("skipped the damaged image %s (%s); %d so far", printable(name), self._reasons[name], count)
        if count > self._limit:
            listed = ", ".join(map(printable, self.names[:5])) + (" ..." if count > 5 else "")
            raise UserError(
                f"{count} images are damaged ({listed}): get them again or delete them, or raise data.max_damaged {self._limit}"
            )


def open_image(content: bytes) -> Image.Image:
    """Open an image, whose pixels are decoded on first use. Raises any of the errors that `decode_all` handles."""
    if content[:1] == b"P" and not _PPM_HEADER.match(content[:4096]):
        raise ValueError("it has no header of a PPM image, or a very long one")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it is of {image.width} x {image.height}: at most {MAX_PIXELS} pixels are decoded")
    if content[:2] in (b"P1", b"P2", b"P3") and len(content) > MAX_PLAIN_BYTES:
        raise ValueError(f"it has {len(content)} bytes of decimal numbers: at most {MAX_PLAIN_BYTES} are decoded")
    return image


@contextlib.contextmanager
def decoding(*images: Image.Image) -> Generator[None]:
    """Decode images in a `with` block, which frees their pixels at its end; blocks with large images run one at a time."""
    large = max(image.width * image.height for image in images) > LARGE
    with _one_large if large else contextlib.nullcontext():
        try:
            yield
        finally:
            for image in images:
                image.close()


_one_large = threading.Lock()


def decode_all(
    names: Iterable[str], decode: Callable[[int, str], Decoded], damaged: DamagedFiles, label: Callable[[str], str] = str
) -> list[Decoded | None]:
    """Call `decode(i, name)` for every name, in several threads.

    Args:
        names: the names, in order.
        decode: may raise any error: Pillow and zipfile raise many for damaged files.
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
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OUTSIDE:
                raise UserError(f"cannot read {printable(label(item[1]))}: {error.strerror}") from error
            damaged.add(label(item[1]), str(error) or type(error).__name__)
            return None

    return list(_pool().map(attempt, enumerate(names)))


def to_array(image: Image.Image) -> np.ndarray:
    """Convert to (H, W, 3) uint8."""
    return np.asarray(image.convert("RGB"))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The thread pool of the process, created on first use."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
