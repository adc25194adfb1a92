"""Files that a run did not write itself: ordinary ones only, of bounded size; JSON of bounded depth."""

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deq_flax.errors import UserError

MAX_JSON_BYTES = 1 << 23
"""Largest size of a JSON file in bytes; the record of a checkpoint has 100 bytes an array."""
MAX_DEPTH = 32
"""Most lists and objects within each other; a checkpoint's record has six."""
MAX_INTEGER = 1 << 53
"""Bound on the integers in JSON that are taken; readers agree on those below."""
SHOWN = 5
"""Names that a message lists."""
WIDTH = 120
"""Characters of a name that a message shows."""


def check_regular(path: str | Path) -> int:
    """The size of an ordinary file in bytes.

    Reading a pipe can wait for ever, reading a device can go on for ever.

    Raises:
      OSError: there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise OSError("it is a pipe, a socket or a device, not a file")
    return status.st_size


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of an ordinary file of at most `limit` bytes. OSError: it cannot be read, or is larger."""
    if check_regular(path) > limit:
        raise OSError(f"it is larger than {limit} bytes")
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"it is larger than {limit} bytes")
    return content


def read_text(path: str | Path, limit: int, what: str) -> str:
    """The content of an ordinary file of UTF-8, at most `limit` bytes. UserError: it cannot be read; `what` names the file."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text") from error


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. OSError: it cannot be read. ValueError: it is not JSON, or nested too deeply."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError: it is not JSON, or nested more than MAX_DEPTH deep."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    brackets = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(text.count(bracket) for bracket in brackets) <= MAX_DEPTH:  # ty: ignore[invalid-argument-type]
        return value
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            x for node in level if isinstance(node, list | dict) for x in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def shown(name: object) -> str:
    """A name from a file as a message may show it: on one line, printable, not long."""
    text = name if isinstance(name, str) else f"{name:.6g}" if isinstance(name, float) else _plain(name)
    text = printable(text[: WIDTH + 1])
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def printable(text: str) -> str:
    """A text on one line, without what a terminal would obey."""
    return text if text.isprintable() else ascii(text)


def listed(names: Iterable[object]) -> str:
    """The first names, and the number of the others."""
    names = list(names)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(shown, names[:SHOWN])) + more


def _plain(value: object) -> str:
    """A value as a message may show it: a number; of anything else, which may be large or nested, the type."""
    small = value is None or isinstance(value, bool) or (isinstance(value, int) and value.bit_length() < 64)
    return str(value) if small else type(value).__name__
