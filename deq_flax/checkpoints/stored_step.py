"""One checkpoint on disk: the record that describes it, and reading it back with every doubt checked."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from deq_flax.checkpoints.checksum import describe, dtype_of
from deq_flax.devices.mesh import place
from deq_flax.errors import UserError


class DamagedError(UserError):
    """A checkpoint that cannot be trusted; another one may be whole."""


class DiskError(UserError):
    """The disk refuses a checkpoint; later it may take one."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back; what was not asked for is None."""

    step: int
    params: Any
    rest: Any
    data: Any
    meta: dict[str, Any]
    ema: Any = None
    variables: Any = None
    """What the rest holds under that name."""

    @property
    def weights(self) -> Any:
        """The running average of the parameters if there is one, else the parameters."""
        return self.params if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class Borrowed:
    """What a model takes over from a checkpoint of another one, and the names of all it concerns."""

    params: Any
    variables: Any
    loaded: list[str]
    fresh: list[str]
    """Of the model's, those that stay as they were initialised."""
    unused: list[str]
    """Of the checkpoint's, those that the model has no use for."""


def steps_in(directory: Path) -> list[int]:
    """The numbered folders, in order. Unfinished ones carry a suffix and are not among them."""
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal() and entry.is_dir())


def is_step(folder: Path) -> bool:
    """Whether `folder` is itself a checkpoint, under whatever name."""
    return (folder / "meta").is_dir()


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them, such as `opt/0/mu/embed/w`. The structure itself is the template's affair."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have the same path"
    return named


def make_record(
    step: int,
    trees: Mapping[str, Any],
    data: Any,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
) -> dict[str, Any]:
    """What goes into `meta`: the caller's part, then names, shapes, types and checksums of all arrays."""
    record = dict(meta) | {
        "step": int(step),
        "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
        "arrays": {item: {name: describe(leaf) for name, leaf in named_leaves(tree).items()} for item, tree in trees.items()},
        "versions": {"format": 1, "jax": jax.__version__, "orbax": ocp.__version__},
    }
    return record | {"checksum": _json_checksum(record, data)}


def storable(trees: Mapping[str, Any]) -> dict[str, dict]:
    """Each tree as nested dictionaries of arrays. Orbax refuses arrays without elements: the record alone remembers them."""
    nested = {}
    for item, tree in trees.items():
        leaves = {name: leaf for name, leaf in named_leaves(tree).items() if np.size(leaf)}
        # An array of the caller's may change while the checkpoint is written; Orbax copies those of the device itself.
        leaves = {name: leaf if isinstance(leaf, jax.Array) else np.array(leaf) for name, leaf in leaves.items()}
        if leaves:
            nested[item] = _nest(leaves)
    return nested


def read_record(folder: Path) -> tuple[dict[str, Any], Any]:
    """(meta, data) of the checkpoint in `folder`, or DamagedError."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            record, data = reader.restore(folder / "meta"), reader.restore(folder / "data")
        stated = record.pop("checksum")
    except Exception as error:  # of many types, see the module's head
        raise _damaged(folder, f"its records cannot be read ({_reason(error)})") from error
    if stated != _json_checksum(record, data):
        raise _damaged(folder, "its records do not match their checksum")
    return record, data


def read_step(folder: Path, *, params: Any, rest: Any = None, ema: Any = None, variables: Any = None) -> Restored:
    """The checkpoint in `folder`; each keyword a template or None. An ema that is not there is None.

    `variables` is for those who want of the rest only what it holds under that name.

    Raises:
      DamagedError: something is missing, unreadable or differs from its checksum.
      UserError: names, shapes or types differ from a template.
    """
    record, data = read_record(folder)
    described = record["arrays"]
    trees = {"params": params, "rest": rest, "ema": ema if "ema" in described else None}
    trees = {item: (template, described.get(item)) for item, template in trees.items() if template is not None}
    if variables is not None:
        part = {name: entry for name, entry in described["rest"].items() if name.startswith("variables/")}
        trees["rest"] = {"variables": variables}, part
    for item, (template, entries) in trees.items():
        _require_same(folder, item, template, entries)
    read = {item: _read_tree(folder, item, template, entries) for item, (template, entries) in trees.items()}
    if variables is not None:
        read["variables"] = read.pop("rest")["variables"]
    parts = {item: read.get(item) for item in ("params", "rest", "ema", "variables")}
    return Restored(step=record["step"], data=data, meta=record, **parts)


def borrow(folder: Path, *, params: Any, variables: Any, head: str) -> Borrowed:
    """Weights (their running average, if one was kept) and other variables for a model with another head.

    Args:
      folder: of the checkpoint.
      params, variables: the model's, freshly initialised; nested dictionaries of arrays.
      head: names that begin with it and a '/' may be absent or differ in shape; what does fit there is taken over too.

    Raises:
      DamagedError: something is missing, unreadable or differs from its checksum.
      UserError: names, shapes or types differ outside of the head.
    """
    record, _ = read_record(folder)
    item = "ema" if "ema" in record["arrays"] else "params"
    own = {item: params, "rest": {"variables": variables}}
    trees, names = {}, {"loaded": [], "fresh": [], "unused": []}
    for item, template in own.items():
        leaves, prefix = named_leaves(template), "variables/" if item == "rest" else ""
        found = {name: entry for name, entry in record["arrays"][item].items() if name.startswith(prefix)}
        inside = {name for name in leaves.keys() | found.keys() if name.startswith(f"{prefix}{head}/")}
        other = {name for name in inside if name not in leaves or name not in found or not _fits(leaves[name], found[name])}
        wanted = _nest({name: leaf for name, leaf in leaves.items() if name not in other})
        described = {name: entry for name, entry in found.items() if name not in other}
        _require_same(folder, item, wanted, described)
        read = named_leaves(_read_tree(folder, item, wanted, described))
        trees[item] = jax.tree.unflatten(jax.tree.structure(template), [read.get(name, leaf) for name, leaf in leaves.items()])
        names["loaded"] += [*read]
        names["fresh"] += [name for name in leaves if name in other]
        names["unused"] += [name for name in found if name in other]
    rest = trees.pop("rest")
    return Borrowed(params=trees.popitem()[1], variables=rest["variables"], **names)


def _fits(leaf: Any, entry: Mapping[str, Any]) -> bool:
    return (list(np.shape(leaf)), str(dtype_of(leaf))) == (list(entry["shape"]), entry["dtype"])


def _read_tree(folder: Path, item: str, template: Any, described: Mapping[str, Any]) -> Any:
    """`described`: what the record says of the leaves of the template, which may be a part of the item only."""
    wanted = named_leaves(template)
    stored = {name: leaf for name, leaf in wanted.items() if np.prod(described[name]["shape"])}
    read = {}
    if stored:
        specs = {name: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)) for name, leaf in stored.items()}
        arguments = {name: _restore_argument(leaf) for name, leaf in stored.items()}
        request = ocp.args.PyTreeRestore(item=_nest(specs), restore_args=_nest(arguments), partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                read = named_leaves(reader.restore(folder / item, args=request))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of many types, see the module's head
            raise _damaged(folder, f"{item} cannot be read ({_reason(error)})") from error
    leaves = []
    for name, leaf in wanted.items():
        value = read[name] if name in read else np.zeros(np.shape(leaf), dtype_of(leaf))
        kind = "sum32" if "sum32" in described[name] else "crc32"
        if describe(value, kind) != described[name]:
            raise _damaged(folder, f"{item}/{name} does not match its checksum")
        leaves.append(_like(leaf, value))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _require_same(folder: Path, item: str, template: Any, described: Mapping[str, Any]) -> None:
    """Compares names, shapes and types before Orbax meets them: its own complaint would be pages long."""
    wanted = {name: (tuple(np.shape(leaf)), str(dtype_of(leaf))) for name, leaf in named_leaves(template).items()}
    found = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in described.items()}
    lines = []
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if wanted.get(name) != found.get(name):
            has, needs = ("nothing" if x is None else f"{x[1]}{list(x[0])}" for x in (found.get(name), wanted.get(name)))
            lines.append(f"{name}: file has {has}, this run needs {needs}")
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(f"checkpoint {folder} does not fit this config ({item}): {'; '.join(lines[:3])}{more}")


def _restore_argument(leaf: Any) -> ocp.RestoreArgs:
    sharding = _sharding(leaf)
    # One of several processes reads everything: so that all of them find the same damage, and none waits for another.
    if sharding is None or jax.process_count() > 1:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


def _sharding(leaf: Any) -> Sharding | None:
    """Where the caller wants this leaf; None for the host or for the default device, without a commitment to it."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _like(leaf: Any, value: Any) -> Any:
    """`value` in the kind of array that the template's `leaf` is."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        sharding = _sharding(leaf)
        if isinstance(value, jax.Array):
            return value
        return jnp.array(value) if sharding is None else place(value, sharding)
    return value if isinstance(leaf, np.ndarray) else type(leaf)(value[()])


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return nested


def _json_checksum(record: Mapping[str, Any], data: Any) -> int:
    # Through JSON once, so that what was read and what is about to be written look alike.
    text = json.dumps(json.loads(json.dumps([record, data])), sort_keys=True)
    return zlib.crc32(text.encode())


def _damaged(folder: Path, what: str) -> DamagedError:
    return DamagedError(f"checkpoint {folder} is damaged: {what}")


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
