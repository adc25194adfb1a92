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


def write(path: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a file, each in place of that with its key. Lines are in order of the keys, so that few of them change."""
    from deq_flax.run_log.results import replace_file, to_json

    records = read(path) | {record["key"]: record for record in found}
    replace_file(path, "".join(f"{to_json(records[key])}\n" for key in sorted(records)).encode())
