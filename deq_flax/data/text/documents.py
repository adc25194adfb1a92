"""Text files of any number and size, read as a stream of pieces, each of which ends at a line break or a file's end."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deq_flax.data.loading import readable
from deq_flax.errors import UserError
from deq_flax.untrusted.files import check_regular

PIECE_BYTES = 1 << 16
"""Approximate size of a piece in bytes; a longer line is cut between characters."""


@dataclass
class Documents:
    """Text files in the order of their paths.

    Args:
        files: the files, at least one.
    """

    files: list[Path]
    invalid: dict[Path, int] = field(default_factory=dict)
    """Number of byte sequences that are no UTF-8 and were read as U+FFFD, by file, when it was last read."""

    @classmethod
    def find(cls, places: list[str]) -> "Documents":
        """Find the files at `places`: files, or folders with all the files below them, hidden ones excepted.

        Raises:
            UserError: a place does not exist or cannot be read, or there is no text in any.
        """
        files: list[Path] = []
        for place in map(Path, places):
            with readable(place):
                if not place.exists():
                    raise UserError(f"--input {place} does not exist")
                if place.is_dir():
                    below = place.rglob("*")
                    files += sorted(f for f in below if f.is_file() and not _hidden(f.relative_to(place)))
                elif place.is_file():
                    files.append(place)
                else:
                    raise UserError(f"--input {place} is neither a file nor a folder")
        files = [file for file in files if file.stat().st_size]
        if not files:
            raise UserError(f"no text in {', '.join(places)}: all files are empty")
        return cls(files)

    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(file.stat().st_size for file in self.files)

    def pieces(self, progress: Callable[[int], object] = lambda n_bytes: None) -> Iterator[tuple[str, bool]]:
        """Yield pieces of text, each with True if it ends its file.

        Args:
            progress: called with the number of bytes read, after each read.

        Raises:
            UserError: a file cannot be read.
        """
        for file in self.files:
            with readable(file):
                check_regular(file)
            with readable(file), open(file, "rb") as stream:
                self.invalid.pop(file, None)
                rest, data = b"", stream.read(PIECE_BYTES)
                while data:
                    progress(len(data))
                    following = stream.read(PIECE_BYTES)
                    end = len(rest) + len(data) if not following else _end(rest + data)
                    data = rest + data
                    if end:
                        yield self._decode(file, data[:end]), not following
                    rest, data = data[end:], following

    def _decode(self, file: Path, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("utf-8", errors="replace")
            found = text.count("\ufffd") - data.count("\ufffd".encode())
            self.invalid[file] = self.invalid.get(file, 0) + found
            return text


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
