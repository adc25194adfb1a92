"""Records of measurements that take hours, kept in the repository: a file of lines of JSON, each with its `key`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Records = Mapping[str, Mapping[str, Any]]
"""Key -> record."""


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by key; of several with one key the last. No file: none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


def add(path: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """Append the records that are not there as they are. Processes that add to one file at a time lose none of each other's."""
    there = read(path)
    new = [f"{json.dumps(record)}\n" for record in found if record != there.get(record["key"])]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(new))
