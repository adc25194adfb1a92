"""Weights and metadata from a path: to evaluate them, to start another run from them, or to convert them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deq_flax.checkpoints.checkpoints import Checkpoints
from deq_flax.checkpoints.stored_step import (
    Restored,
    dtype_of,
    is_step,
    named_leaves,
    nested,
    read_record,
    read_step,
    read_tree,
    require_same,
    steps_in,
)
from deq_flax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartiallyRestored:
    """Weights of a model of which some come from a checkpoint, and the names of all arrays concerned."""

    params: Any
    variables: Any
    loaded: list[str]
    """Arrays taken from the checkpoint."""
    fresh: list[str]
    """Arrays of the model that keep their initial values."""
    unused: list[str]
    """Arrays of the checkpoint that the model does not have, or has with another shape."""


def load_params(path: str | Path, params: Any, variables: Any = None) -> Restored:
    """The weights of a checkpoint: `eval_params` and `variables` of the result are what to evaluate or to start from.

    Args:
      path: a run's workdir or its checkpoints folder, of which the best checkpoint is taken, or one checkpoint.
      params, variables: templates, as for `Checkpoints.restore`. `variables`: what else the model needs, such as the running
        statistics of batch normalization.

    Raises:
      UserError: there is no checkpoint, it is damaged, or it does not fit the templates.
    """
    folder = find_checkpoint(path)
    if is_step(folder):
        return read_step(folder, params=params, ema=params, variables=variables)
    return Checkpoints(folder, read_only=True).restore_best(params=params, variables=variables)


def load_meta(path: str | Path) -> dict[str, Any]:
    """The record (config, step, metrics, arrays) of the checkpoint that `load_params` would load. Errors as there."""
    return read_record(_one_step(path))


def load_params_except_head(path: str | Path, params: Any, variables: Any, head: str) -> PartiallyRestored:
    """The weights of a checkpoint for a model with another head: to fine-tune it on another task.

    Takes the moving average of the parameters if one was kept.

    Args:
      path: as for `load_params`.
      params, variables: parameters and variables of the initialized model, nested dictionaries of arrays.
      head: name of the head. Arrays whose path begins with it and a '/' may be missing or differ in shape; those that fit are
        loaded too.

    Raises:
      UserError: there is no checkpoint, it is damaged, or names, shapes or dtypes differ outside the head.
    """
    folder = _one_step(path)
    record = read_record(folder)
    item = "ema" if "ema" in record["arrays"] else "params"
    templates = {item: params, "rest": {"variables": variables}}
    trees: dict[str, Any] = {}
    names: dict[str, list[str]] = {"loaded": [], "fresh": [], "unused": []}
    for item, template in templates.items():
        leaves, prefix = named_leaves(template), "variables/" if item == "rest" else ""
        found = {name: entry for name, entry in record["arrays"][item].items() if name.startswith(prefix)}
        in_head = {name for name in leaves.keys() | found.keys() if name.startswith(f"{prefix}{head}/")}
        misfits = {name for name in in_head if name not in leaves or name not in found or not _fits(leaves[name], found[name])}
        wanted = nested({name: leaf for name, leaf in leaves.items() if name not in misfits})
        described = {name: entry for name, entry in found.items() if name not in misfits}
        require_same(folder, item, wanted, described)
        read = named_leaves(read_tree(folder, item, wanted, described))
        trees[item] = jax.tree.unflatten(jax.tree.structure(template), [read.get(name, leaf) for name, leaf in leaves.items()])
        names["loaded"] += read
        names["fresh"] += [name for name in leaves if name in misfits]
        names["unused"] += [name for name in found if name in misfits]
    rest = trees.pop("rest")
    return PartiallyRestored(params=trees.popitem()[1], variables=rest["variables"], **names)


def _fits(leaf: Any, entry: Mapping[str, Any]) -> bool:
    return (list(np.shape(leaf)), str(dtype_of(leaf))) == (list(entry["shape"]), entry["dtype"])


def _one_step(path: str | Path) -> Path:
    """The folder of the checkpoint that `path` means; of a run's, the best one."""
    folder = find_checkpoint(path)
    if is_step(folder):
        return folder
    step = Checkpoints(folder, read_only=True).best_step()
    if step is None:
        raise UserError(f"no whole checkpoint in {folder}")
    return folder / str(step)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoints folder or the checkpoint that `path` means. UserError: it is neither."""
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not is_step(folder) and not steps_in(folder):
        raise UserError(f"no checkpoint at {path}: it is neither a workdir, nor its checkpoints folder, nor one step of it")
    return folder
