"""The files that hold a text, plain or inside a zip, found and read in pieces."""

import contextlib
import os
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deq_flax.data.splits import SPLITS
from deq_flax.errors import UserError

PIECE_BYTES = 1 << 20
"""Small: the words of a piece are Python strings, 20 times its size, and are faster while they fit the processor's cache."""


@contextlib.contextmanager
def readable(label: object) -> Generator[None]:
    """Turn what can go wrong while reading a file into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {label}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{label} is damaged or not a zip file that can be read ({error}); get it again") from error


@dataclass(frozen=True)
class TextFile:
    """One UTF-8 text: a file, or a member of a zip file."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def size(self) -> int:
        """Bytes of text. Raises UserError if the file cannot be read or is empty."""
        with readable(self):
            if self.member:
                with zipfile.ZipFile(self.path) as archive:
                    size = archive.getinfo(self.member).file_size
            else:
                size = self.path.stat().st_size
        if size == 0:
            raise UserError(f"{self} is empty")
        return size

    def stamp(self) -> list:
        """What tells this file from a changed one: path, member, size and time of the last change."""
        with readable(self):
            status = self.path.stat()
        return [str(self.path.resolve()), self.member, status.st_size, status.st_mtime_ns]

    def open(self) -> IO[bytes]:
        if not self.member:
            return self.path.open("rb")
        with zipfile.ZipFile(self.path) as archive:
            return archive.open(self.member)

    def pieces(self, progress: Callable[[int], object] = lambda n_bytes: None) -> Iterator[str]:
        """The text in pieces of about PIECE_BYTES cut between words, every line ended by one '\\n'.

        Raises:
            UserError: the file cannot be read, is not UTF-8, or has no space or line break where one must be.
        """
        with readable(self), self.open() as stream:
            offset, rest, data = 0, b"", b""
            while chunk := stream.read(PIECE_BYTES):
                progress(len(chunk))
                data = rest + chunk
                end = max(data.rfind(b" "), data.rfind(b"\n")) + 1
                if end == 0 and len(data) >= PIECE_BYTES:
                    raise UserError(f"{self} is no text of words: no space or line break in {len(data)} bytes")
                if end:
                    yield self._decode(data[:end], offset)
                offset, rest = offset + end, data[end:]
            if rest:
                yield self._decode(rest, offset)
            if not (rest or data).endswith((b"\n", b"\r")):
                yield "\n"

    def _decode(self, data: bytes, offset: int) -> str:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self} is not UTF-8 text (byte {offset + error.start})") from error
        return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


@dataclass(frozen=True)
class Layout:
    """How a dataset is published: the names of its files, what to do with them, and where they are to be had."""

    patterns: tuple[str, ...]
    """File names, '{}' standing for the split; the first is the published one."""
    lower_case: bool
    counted: tuple[str, ...]
    """The splits whose words make the vocabulary."""
    published: str
    zip_name: str = ""


def find_texts(layout: Layout, path: str) -> dict[str, TextFile]:
    """The file of each split. `path`: the folder of the files, or the zip (or its folder) if the dataset has one.

    Raises:
        UserError: a file is not there; the message says what to put where.
    """
    if not path:
        raise UserError(f"data.path is not set: {_wanted(layout)}")
    place = Path(os.path.expanduser(path))
    with readable(place):
        if place.is_dir():
            texts = _in_folder(layout, place)
        elif not place.exists():
            raise UserError(f"data.path {place} does not exist: {_wanted(layout)}")
        elif layout.zip_name:
            texts = _in_zip(layout, place)
        else:
            raise UserError(f"data.path {place} is a file: {_wanted(layout)}")
    return texts


def _in_folder(layout: Layout, folder: Path) -> dict[str, TextFile]:
    for pattern in layout.patterns:
        texts = {split: TextFile(folder / pattern.format(split)) for split in SPLITS}
        present = [text.path.exists() for text in texts.values()]
        if all(present):
            return texts
        if any(present):
            missing = ", ".join(text.path.name for text, there in zip(texts.values(), present, strict=True) if not there)
            raise UserError(f"{folder} lacks {missing}: {_wanted(layout)}")
    if layout.zip_name and (folder / layout.zip_name).exists():
        return _in_zip(layout, folder / layout.zip_name)
    raise UserError(f"{folder} holds none of the files: {_wanted(layout)}")


def _in_zip(layout: Layout, path: Path) -> dict[str, TextFile]:
    with readable(path), zipfile.ZipFile(path) as archive:
        by_name = {member.rsplit("/", 1)[-1]: member for member in archive.namelist()}
    names = {split: layout.patterns[0].format(split) for split in SPLITS}
    missing = [name for name in names.values() if name not in by_name]
    if missing:
        raise UserError(f"the zip file {path} lacks {', '.join(missing)}: {_wanted(layout)}")
    return {split: TextFile(path, by_name[name]) for split, name in names.items()}


def _wanted(layout: Layout) -> str:
    names = " or ".join(pattern.format("{train,valid,test}") for pattern in layout.patterns)
    zipped = f", or of {layout.zip_name}" if layout.zip_name else ""
    return f"set data.path to the folder of {names}{zipped}; published as {layout.published}"
