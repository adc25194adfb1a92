"""Hostile files, by what they are instead of. Each module has `cases(random)`, which yields cases in the same order always."""

import dataclasses
from collections.abc import Callable
from pathlib import Path


class SilentlyWrongError(Exception):
    """Raised by a case whose file was taken for what it is not."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile file, or a few that belong together."""

    kind: str
    """The class of the attack, a row of the table."""
    name: str
    make: Callable[[Path], Path]
    """Writes into an empty folder; returns the path to read."""
    read: Callable[[Path], object]
    """Reads as the package's commands do. It returns, or raises `UserError`, or else the case is a finding."""


def damaged(data: bytes, random) -> bytes:
    """`data` cut off, with a part removed, repeated or zeroed, or with one to four bytes changed."""
    kind, place = random.integers(6), int(random.integers(len(data)))
    end = min(len(data), place + int(random.integers(1, 200)))
    match kind:
        case 0:
            return data[:place]
        case 1:
            return data[:place] + data[end:]
        case 2:
            return data[:end] + data[place:]
        case 3:
            return data[:place] + bytes(end - place) + data[end:]
    out = bytearray(data)
    for place in random.integers(len(data), size=random.integers(1, 5)):
        out[place] ^= int(random.integers(1, 256))
    return bytes(out)
