"""Text files of any number and size, read as a stream of pieces, each of which ends at a line break or a file's end."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from deq_flax.data.loading import readable
from deq_flax.errors import UserError
from deq_flax.untrusted.files import check_regular

PIECE_BYTES = 1 << 16
"""Approximate size of a piece in bytes; a longer line is cut between characters."""


class Piece(NamedTuple):
    """A part of a file."""

    text: str
    size: int
    """Bytes of the file, which are not those of `text` where it is no UTF-8."""
    ends: bool
    """It ends its file."""


@dataclass
class Documents:
    """Text files in the order of their paths, or a part of the text of all together.

    Args:
        files: the files, at least one.
        start, stop: bounds of the part in bytes, each moved to the next end of a line.
    """

    files: list[Path]
    start: float = 0
    stop: float = math.inf
    invalid: dict[Path, int] = field(default_factory=dict)
    """Number of byte sequences that are no UTF-8 and were read as U+FFFD, by file, when the part was last read."""

    @classmethod
    def find(cls, places: list[str], option: str = "--input") -> "Documents":
        """Find the files at `places`: files, or folders with all the files below them, hidden ones excepted.

        Args:
            places: paths.
            option: what the paths were given for, for messages.

        Raises:
            UserError: a place is empty, does not exist or cannot be read, or there is no text in any.
        """
        files: list[Path] = []
        for place in places:
            if not place:
                raise UserError(f"{option} is empty: give a file or a folder")
            files += _below(Path(place), option)
        files = [file for file in files if file.stat().st_size]
        if not files:
            raise UserError(f"{option}: no text in {', '.join(places)}: all files are empty")
        return cls(files)

    def part(self, start: float, stop: float) -> "Documents":
        """The text from byte `start` to byte `stop` of all files together."""
        return replace(self, start=start, stop=stop, invalid={})

    def size(self) -> int:
        """Size in bytes, of a part up to the length of a line."""
        return int(min(self.stop, sum(file.stat().st_size for file in self.files)) - self.start)

    def pieces(self) -> Iterator[Piece]:
        """Yield the text in pieces. UserError: a file cannot be read."""
        self.invalid.clear()
        position = 0
        for file in self.files:
            for data, ends in _read(file):
                start, stop = (_line_end(data, bound - position) for bound in (self.start, self.stop))
                if start < stop:
                    yield Piece(self._decode(file, data[start:stop]), stop - start, ends and stop == len(data))
                position += len(data)
                if position >= self.stop:
                    return

    def _decode(self, file: Path, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("utf-8", errors="replace")
            found = text.count("\ufffd") - data.count("\ufffd".encode())
            self.invalid[file] = self.invalid.get(file, 0) + found
            return text


def _below(place: Path, option: str) -> list[Path]:
    with readable(place):
        if not place.exists():
            raise UserError(f"{option} {place} does not exist")
        if place.is_dir():
            return sorted(file for file in place.rglob("*") if file.is_file() and not _hidden(file.relative_to(place)))
        if place.is_file():
            return [place]
    raise UserError(f"{option} {place} is neither a file nor a folder")


def _read(file: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield the pieces of a file, each with True if it is the last."""
    with readable(file):
        check_regular(file)
    with readable(file), open(file, "rb") as stream:
        rest, data = b"", stream.read(PIECE_BYTES)
        while data:
            following = stream.read(PIECE_BYTES)
            data = rest + data
            end = _end(data) if following else len(data)
            if end:
                yield data[:end], not following
            rest, data = data[end:], following


def _line_end(data: bytes, bound: float) -> int:
    """Return the end of the line that contains byte `bound`, within data; 0 for a bound before it."""
    if bound <= 0:
        return 0
    return len(data) if bound >= len(data) else data.find(b"\n", math.ceil(bound) - 1) + 1 or len(data)


def _end(data: bytes) -> int:
    """Return where a piece may end: after the last line break, else before the last character, which may be incomplete."""
    end = data.rfind(b"\n") + 1
    if end or len(data) < PIECE_BYTES:
        return end
    end = len(data) - 1
    while end > len(data) - 4 and data[end] & 0xC0 == 0x80:  # continuation bytes
        end -= 1
    return end


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
