"""One checkpoint on disk: `<step>/{params,rest,ema,meta}`, its record, and reading it back verified.

Each item is a folder written by Orbax. `meta` holds the record: the caller's metadata, and the name, shape, dtype and checksum
of every array. The checksums are ours because Orbax has none: it restores a flipped byte silently, and reports other damage by
one of five exception types, so that here any exception while reading means damage.

Format 1 stored the position in the data as a further item, `data`, which the checksum of the record covered too.
"""

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from deq_flax.devices.mesh import place
from deq_flax.errors import UserError
from deq_flax.untrusted.files import MAX_INTEGER, check_regular, read_json, shown

FORMAT = 2
"""The format that is written; it and those before it can be read."""

_STEP = re.compile(r"0|[1-9][0-9]{0,15}")

RETIRED = {("rest", "skipped_in_all")}
"""(item, array) of earlier formats that is ignored where the template does not have it."""


class DamagedError(UserError):
    """A checkpoint failed verification; an older one may pass."""


class DiskError(UserError):
    """The disk refused a checkpoint; a later attempt may succeed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint read back. Items that were not requested are None."""

    step: int
    params: Any
    rest: Any
    ema: Any
    variables: Any
    """The entry `variables` of `rest`."""
    meta: dict[str, Any]
    """The record: the caller's metadata, `step`, `metrics`, `arrays`, `versions`."""

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate with: their moving average if one was kept, else the parameters themselves."""
        return self.params if self.ema is None else self.ema


def steps_in(directory: Path) -> list[int]:
    """The numbered folders in ascending order. Unfinished ones have a suffix and are left out."""
    return sorted(int(entry.name) for entry in directory.iterdir() if _STEP.fullmatch(entry.name) and entry.is_dir())


def is_step(folder: Path) -> bool:
    """Return True if `folder` is itself a checkpoint, whatever its name."""
    return (folder / "meta").is_dir()


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by path, such as `opt/0/mu/embed/w`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have the same path"
    return named


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from leaves by path."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        parent = tree
        for key in parents:
            parent = parent.setdefault(key, {})
        parent[last] = leaf
    return tree


def make_record(
    step: int, trees: Mapping[str, Any], meta: Mapping[str, Any], metrics: Mapping[str, float] | None
) -> dict[str, Any]:
    """The content of the item `meta`: the caller's `meta`, then names, shapes, dtypes and checksums of all arrays."""
    record = dict(meta) | {
        "step": int(step),
        "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
        "arrays": {item: {name: describe(leaf) for name, leaf in named_leaves(tree).items()} for item, tree in trees.items()},
        "versions": {"format": FORMAT, "jax": jax.__version__, "orbax": ocp.__version__},
    }
    return record | {"checksum": _json_checksum(record)}


def storable(trees: Mapping[str, Any]) -> dict[str, dict]:
    """Each tree as nested dictionaries of arrays. Arrays without elements, which Orbax refuses, are in the record alone."""
    items = {}
    for item, tree in trees.items():
        leaves = {name: leaf for name, leaf in named_leaves(tree).items() if np.size(leaf)}
        # The caller may change a NumPy array while the checkpoint is being written; Orbax copies device arrays itself.
        leaves = {name: leaf if isinstance(leaf, jax.Array) else np.array(leaf) for name, leaf in leaves.items()}
        if leaves:
            items[item] = nested(leaves)
    return items


def read_record(folder: Path, *, step: int | None = None) -> dict[str, Any]:
    """The record of the checkpoint in `folder`, its checksum verified.

    Args:
      folder: the checkpoint.
      step: the number by which the folder is one of a run's, None if it is not. The record's own number must be the same: a
        copy under another number is not that step.

    Raises:
      DamagedError: it is missing, unreadable, differs from its checksum or is of another step.
      UserError: a later version of this package wrote it.
    """
    try:
        # Bounded in size and depth, as Orbax's own reading of the same file is not.
        record = read_json(folder / "meta" / "metadata")
        stated, version = record.pop("checksum"), record["versions"]["format"]
        covered = [record, read_json(folder / "data" / "metadata")] if version == 1 else record
        matches, known = stated == _json_checksum(covered), version <= FORMAT
    except Exception as error:  # any of many types
        raise _damaged(folder, f"its records cannot be read ({_reason(error)})") from error
    if not matches:
        raise _damaged(folder, "its records do not match their checksum")
    if not known:
        raise UserError(
            f"checkpoint {folder} has format {shown(version)}, and this deq_flax reads up to {FORMAT}: install a newer one"
        )
    if not _is_record(record):
        raise _damaged(folder, "its records are not those of a checkpoint")
    if step is not None and record["step"] != step:
        raise _damaged(folder, f"it is a copy of the checkpoint of step {record['step']}")
    return record


def _is_record(record: Mapping[str, Any]) -> bool:
    """Return True if a record has all that reading a checkpoint relies on, of the right types."""
    step, metrics, arrays = record.get("step"), record.get("metrics", ()), record.get("arrays")
    whole = (
        type(step) is int and 0 <= step < MAX_INTEGER and isinstance(arrays, dict) and isinstance(arrays.get("params"), dict)
    )
    if not whole or not (metrics is None or isinstance(metrics, dict)):
        return False
    scores = metrics.values() if metrics else ()
    entries = [entry for item in arrays.values() for entry in (item.values() if isinstance(item, dict) else (None,))]
    return all(type(x) is float for x in scores) and all(map(_is_entry, entries)) and _is_window(record.get("window", {}))


def _is_window(window: Any) -> bool:
    """Return True if a value holds sums and counts by name, numbers or arrays of them as nested lists."""
    try:
        return all(np.asarray(x, np.float64).size for total, count in window.values() for x in (total, count))
    except (AttributeError, TypeError, ValueError):
        return False


def _is_entry(entry: Any) -> bool:
    """Return True if a value describes an array, as `describe` does."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not isinstance(entry.get("shape"), list):
        return False
    sums = [entry[kind] for kind in ("crc32", "sum32") if kind in entry]
    return len(sums) == 1 and all(type(n) is int and 0 <= n < MAX_INTEGER for n in (*entry["shape"], *sums))


def read_step(
    folder: Path, *, params: Any, rest: Any = None, ema: Any = None, variables: Any = None, step: int | None = None
) -> Restored:
    """The checkpoint in `folder`. Each keyword but `step` is a template, or None for an item that is not to be read.

    A checkpoint without an ema gives None for it. `variables`, instead of `rest`, reads only this entry of `rest`. `step`: as
    for `read_record`.

    Raises:
      DamagedError: something is missing, unreadable or differs from its checksum.
      UserError: names, shapes or dtypes differ from a template.
    """
    record = read_record(folder, step=step)
    described = record["arrays"]
    trees = {"params": params, "rest": rest, "ema": ema if "ema" in described else None}
    trees = {item: (template, described.get(item, {})) for item, template in trees.items() if template is not None}
    if variables is not None:
        entries = {name: entry for name, entry in described.get("rest", {}).items() if name.startswith("variables/")}
        trees["rest"] = {"variables": variables}, entries
    for item, (template, entries) in trees.items():
        require_same(folder, item, template, entries)
    read = {item: read_tree(folder, item, template, entries) for item, (template, entries) in trees.items()}
    if variables is not None:
        read["variables"] = read.pop("rest")["variables"]
    parts = {item: read.get(item) for item in ("params", "rest", "ema", "variables")}
    return Restored(step=record["step"], meta=record, **parts)


def require_same(folder: Path, item: str, template: Any, described: Mapping[str, Any]) -> None:
    """Raise UserError, in one line, where names, shapes or dtypes differ. Orbax's own message would fill pages."""
    wanted = {name: (tuple(np.shape(leaf)), str(dtype_of(leaf))) for name, leaf in named_leaves(template).items()}
    found = {
        name: (tuple(entry["shape"]), entry["dtype"])
        for name, entry in described.items()
        if name in wanted or (item, name) not in RETIRED
    }
    lines = []
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if wanted.get(name) != found.get(name):
            has, needs = ("nothing" if x is None else shown(f"{x[1]}{list(x[0])}") for x in (found.get(name), wanted.get(name)))
            lines.append(f"{shown(name)}: file has {has}, this run needs {needs}")
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(f"checkpoint {folder} does not fit this config ({item}): {'; '.join(lines[:3])}{more}")


def read_tree(folder: Path, item: str, template: Any, described: Mapping[str, Any]) -> Any:
    """The arrays of an item that the template has, verified. `described`: the record's entries, at least for these arrays."""
    wanted = named_leaves(template)
    stored = {name: leaf for name, leaf in wanted.items() if np.prod(described[name]["shape"])}
    read = {}
    if stored:
        specs = {name: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)) for name, leaf in stored.items()}
        arguments = {name: _restore_argument(leaf) for name, leaf in stored.items()}
        request = ocp.args.PyTreeRestore(item=nested(specs), restore_args=nested(arguments), partial_restore=True)
        try:
            _check_files(folder / item)
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                read = named_leaves(reader.restore(folder / item, args=request))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # any of many types
            raise _damaged(folder, f"{item} cannot be read ({_reason(error)})") from error
    leaves = []
    for name, leaf in wanted.items():
        value = read[name] if name in read else np.zeros(np.shape(leaf), dtype_of(leaf))
        kind = "sum32" if "sum32" in described[name] else "crc32"
        if not isinstance(value, np.ndarray | np.generic | jax.Array | int | float):  # Orbax may return the request itself
            raise _damaged(folder, f"{item}/{name} is no array")
        if describe(value, kind) != described[name]:
            raise _damaged(folder, f"{item}/{name} does not match its checksum")
        leaves.append(_like(leaf, value))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_files(item: Path) -> None:
    """Raise OSError or ValueError for a file that Orbax would wait for, such as a pipe, or parse without bound."""
    for parent, _, names in os.walk(item):
        for name in names:
            check_regular(Path(parent) / name)
    if (item / "_METADATA").exists():
        read_json(item / "_METADATA")


def describe(leaf: Any, kind: str | None = None) -> dict[str, Any]:
    """Shape, dtype and checksum of an array: `{"shape": ..., "dtype": ..., kind: number}`.

    Args:
      leaf: an array or a number.
      kind: 'crc32', the CRC-32 of the bytes, or 'sum32', which does not depend on how the array is sharded; all processes
        must ask for it together. None: sum32 for an array of which no process has all shards, else crc32.
    """
    if jax.dtypes.issubdtype(dtype_of(leaf), jax.dtypes.prng_key):
        raise TypeError("a checkpoint holds random keys as raw bits: pass jax.random.key_data(key)")
    described = {"shape": list(np.shape(leaf)), "dtype": str(dtype_of(leaf))}
    if (kind or ("sum32" if _is_distributed(leaf) else "crc32")) == "sum32":
        return described | {"sum32": int(_sum32(leaf))}
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0)
    raw = np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)
    return described | {"crc32": zlib.crc32(raw.data)}


def dtype_of(leaf: Any) -> np.dtype:
    """The dtype of an array, of a `jax.ShapeDtypeStruct` or, as NumPy has it, of a number."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


@jax.jit
def _sum32(x: jax.Array) -> jax.Array:
    """Sum modulo 2^32 of a hash of each element and its index.

    For each index the hash is a bijection of the element's bits, so that a change of any one element changes the sum.
    """
    size = x.dtype.itemsize
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(bits, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)).astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    hashed = bits ^ (index * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        hashed = (hashed ^ (hashed >> shift)) * jnp.uint32(factor)
    return jnp.sum(hashed, dtype=jnp.uint32)


def _is_distributed(leaf: Any) -> bool:
    """Return True if no process has all of the array."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _restore_argument(leaf: Any) -> ocp.RestoreArgs:
    sharding = _sharding(leaf)
    # Each of several processes reads whole arrays: all find the same damage, so that none waits for another in vain.
    if sharding is None or jax.process_count() > 1:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _sharding(leaf: Any) -> Sharding | None:
    """The sharding that the template asks for; None for the host, or for the default device without commitment to it."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _like(leaf: Any, value: Any) -> Any:
    """`value` as the same kind of array as the template's `leaf`."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        sharding = _sharding(leaf)
        if isinstance(value, jax.Array):
            return value
        return jnp.array(value) if sharding is None else place(value, sharding)
    return value if isinstance(leaf, np.ndarray) else type(leaf)(value[()])


def _json_checksum(content: Any) -> int:
    # Through JSON and back first: tuples, for one, are read back as lists.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return zlib.crc32(text.encode())


def _damaged(folder: Path, what: str) -> DamagedError:
    return DamagedError(f"checkpoint {folder} is damaged: {what}")


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
