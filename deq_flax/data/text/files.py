"""Text files, plain or inside a zip file: found by their published names, and read in pieces."""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deq_flax.data.loading import SPLITS, check_member, data_path, readable
from deq_flax.errors import UserError
from deq_flax.untrusted.files import check_regular

PIECE_BYTES = 1 << 20
"""Bytes of text that are split into words at once. The words take 20 times as much and should fit the processor's cache."""

MAX_RATIO, MAX_FLOOR = 16, 1 << 26
"""A member of a zip file may have MAX_FLOOR + MAX_RATIO times its compressed size, in bytes; English text takes a third."""


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 text: a file, or a member of a zip file."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def size(self) -> int:
        """Size of the text in bytes. Raises UserError if the file cannot be read or is empty."""
        with readable(self):
            if self.member:
                with zipfile.ZipFile(self.path) as archive:
                    size = archive.getinfo(self.member).file_size
            else:
                size = check_regular(self.path)
        if size == 0:
            raise UserError(f"{self} is empty")
        return size

    def stamp(self) -> list[str | int]:
        """Identity of the file's content: path, member, size and time of the last change (ns)."""
        with readable(self):
            status = self.path.stat()
        return [str(self.path.resolve()), self.member, status.st_size, status.st_mtime_ns]

    def open(self) -> IO[bytes]:
        """Open the text for reading. Raises OSError or one of the errors of zipfile."""
        if not self.member:
            check_regular(self.path)
            return self.path.open("rb")
        with zipfile.ZipFile(self.path) as archive:
            info = archive.getinfo(self.member)
            check_member(info, MAX_FLOOR + MAX_RATIO * info.compress_size)
            return archive.open(info)

    def pieces(self, progress: Callable[[int], object] = lambda n_bytes: None) -> Iterator[str]:
        """Read the text in pieces of about PIECE_BYTES that end between words, every line ended by one '\\n'.

        Args:
            progress: called with the number of bytes read, after each piece.

        Raises:
            UserError: the file cannot be read, is not UTF-8, or has no space or line break in PIECE_BYTES.
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
    """Published form of a text: the names of its files, how they are encoded, and where to get them."""

    patterns: tuple[str, ...]
    """File names with '{}' for the split; the first is the published one."""
    lower_case: bool
    """Convert words to lower case."""
    counted: tuple[str, ...]
    """Splits whose words form the vocabulary."""
    published: str
    """Publisher and name of the files, for messages."""
    zip_name: str = ""
    """Published zip file that contains the files, if any."""


def find_texts(layout: Layout, path: str) -> dict[str, TextFile]:
    """Find the file of each split.

    Args:
        layout: the published form of the text.
        path: the folder of the files, or the zip file or its folder if the text is published as one.

    Raises:
        UserError: a file is missing; the message says which files are needed and where they are published.
    """
    place = data_path(path, _wanted(layout))
    with readable(place):
        if place.is_dir():
            return _in_folder(layout, place)
        if layout.zip_name:
            return _in_zip(layout, place)
    raise UserError(f"data.path {place} is a file: {_wanted(layout)}")


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
