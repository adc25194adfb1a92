"""Convert weights of the original PyTorch code to a checkpoint, or back.

  python -m deq_flax.convert SOURCE.pth DIR --config wt103:VARIANT [--config.section.key=value ...]
  python -m deq_flax.convert SOURCE.pth DIR --config auto
  python -m deq_flax.convert DIR OUT.pth --to_torch

SOURCE is a state_dict: .pth, .pt or .pkl of torch.save, .safetensors, or .npz. PyTorch is not needed. DIR becomes a workdir:
`deq_flax.main --mode eval --workdir DIR --config.data.path=PATH` evaluates it, `--config.checkpoint.init_from=DIR` starts
training from it, and `deq_flax.generate --checkpoint DIR` generates text with it. `--config auto` is the config of wt103,
cifar10 or cityscapes with the model's sizes read from the file. Options that do not show in a file keep that config's values: a
language model's memory, attention span and order of normalization, an image model's groups of channels. The number of times an
image model halves the resolution at first must be given as --config.model.downsample if the file does not show it.
"""

import contextlib
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from deq_flax import cli
from deq_flax.checkpoints.checkpoints import CheckpointOptions, Checkpoints
from deq_flax.config import Config, to_dict
from deq_flax.errors import UserError
from deq_flax.models import abstract_model
from deq_flax.pretrained import load_model
from deq_flax.run_log.results import replace_file
from deq_flax.torch_checkpoint import (
    FAMILIES,
    Family,
    convert_tensors,
    export_tensors,
    family_name,
    family_of,
    get_arrays,
    head_of,
    mismatches,
    model_of,
    open_tensors,
    set_arrays,
    write_state_dict,
)
from deq_flax.train.step import split_model

_FLAGS = flags.FlagValues()  # not the global ones, so that this module can be imported beside other commands
_CONFIG = cli.config_flag(_FLAGS)
_TO_TORCH = flags.DEFINE_bool(
    "to_torch", False, "write a state_dict that the original code loads, from a checkpoint of ours", flag_values=_FLAGS
)

AUTO_CONFIGS: dict[tuple[str, str | None], str] = {
    ("deq_transformer", None): "wt103",
    ("mdeq", "classification"): "cifar10",
    ("mdeq", "segmentation"): "cityscapes",
}
"""The recipe that `--config auto` starts from, by the model and head of the file."""


WHERE_TOLD = {
    "cutoffs": "the original training script sets them by data set, 20000,40000,200000 for WikiText-103",
    "downsample": "MODEL.DOWNSAMPLE_TIMES in the original experiment's YAML file",
}
"""Places to read options from that a file of weights may not show."""


def main(source: str, destination: str) -> dict[str, Any]:
    """Run the command; returns its result."""
    if _TO_TORCH.value:
        count, names = to_torch(source, Path(destination))
        print(f"wrote {names} tensors, {count:,} parameters, to {destination}")
        return {"file": destination, "tensors": names, "parameters": count}
    cli.require(_CONFIG.value is not None, "--config is missing: a config by name or file, or auto")
    given = {key.removeprefix("model.") for key in cli.given_keys(_FLAGS) if key.startswith("model.")}
    count = convert(Path(source), Path(destination), cli.resolved(_FLAGS), auto=_is_auto(sys.argv), given=given)
    evaluate = f"python -m deq_flax.main --mode eval --workdir {shlex.quote(destination)} --config.data.path=..."
    print(f"wrote {count:,} parameters to {destination}; to evaluate them: {evaluate}")
    return {"workdir": destination, "parameters": count}


def convert(source: Path, directory: Path, config: Config, *, auto: bool = False, given: Collection[str] = ()) -> int:
    """Write the weights in `source` as a checkpoint; returns the number of its parameters.

    Args:
      source: a file that `torch_checkpoint.open_tensors` reads.
      directory: the workdir to create, with `checkpoints/0` and `config.json`.
      config: the config that the checkpoint will hold. A `model.vocab_size` of 0 becomes that of the file.
      auto: take all model options that follow from shapes from the file, except those in `given`.
      given: names of model options that keep the config's values.

    Raises:
      UserError: the file cannot be read or does not fit the config, or the directory is in use. Nothing has been written then.
    """

    _require_unused(directory)
    with open_tensors(source) as file:
        family_name = family_of(config.model.name, file.shapes)
        family = FAMILIES[family_name]
        found = family.infer(file.shapes)
        wanted = _from_file(config, found, source, auto=auto, given=given)
        try:
            config = _with_model(config, wanted)
            model = abstract_model(config.model)
            problems = "; ".join(mismatches(family, model, file.shapes))
        except UserError as error:
            problems = str(error)
        if problems:
            raise UserError(f"{source} does not fit the config: {problems}{_advice(family, config, found, file.shapes)}")
        arrays, buffers = convert_tensors(family, model, file)
    beside = {name: values.tolist() for name, values in buffers.items()}
    meta = {"config": to_dict(config), "converted": {"file": source.name, "family": family_name, "buffers": beside}}
    # Device arrays, because checkpoints copy NumPy arrays; popped, so that no array is held twice.
    set_arrays(model, {path: jax.device_put(arrays.pop(path)) for path in list(arrays)})
    _, params, variables = split_model(model)
    with Checkpoints(directory / "checkpoints", CheckpointOptions(keep_latest=1, keep_best=0)) as checkpoints:
        checkpoints.save(0, params=params, rest={"variables": variables}, meta=meta)
    try:
        replace_file(directory / "config.json", f"{json.dumps(meta['config'], indent=2)}\n".encode())
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    return _count(params)


def to_torch(checkpoint: str | Path, path: Path) -> tuple[int, int]:
    """Write the weights of a checkpoint as a state_dict; returns the numbers of parameters and of tensors.

    Raises:
      UserError: there is no checkpoint, its model has no counterpart in the original code, or the file cannot be written.
    """

    loaded = load_model(checkpoint)
    converted = loaded.meta.get("converted", {})
    buffers = {name: _buffer(values) for name, values in converted.get("buffers", {}).items()}
    name = family_name(converted["family"]) if "family" in converted else family_of(loaded.config.model.name)
    tensors = list(export_tensors(FAMILIES[name], loaded.model, get_arrays(loaded.model), buffers))
    write_state_dict(path, tensors)
    return _count(split_model(loaded.model)[1]), len(tensors)


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _buffer(values: Any) -> np.ndarray:
    """An array from JSON: float32, as models are, or integers."""
    array = np.array(values)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _require_unused(directory: Path) -> None:
    if (directory / "checkpoints").exists() or (directory / "config.json").exists():
        raise UserError(f"{directory} holds a run already: choose another folder")


def _from_file(config: Config, found: Mapping[str, Any], source: Path, *, auto: bool, given: Collection[str]) -> dict[str, Any]:
    """The model options to take from the file. UserError: one is needed that the file does not show."""
    if not auto:
        unknown_size = getattr(config.model, "vocab_size", None) == 0 and "vocab_size" in found
        return {"vocab_size": found["vocab_size"]} if unknown_size else {}
    wanted = {key: value for key, value in found.items() if key not in given}
    if untold := [key for key, value in wanted.items() if value is None]:
        told = f" ({WHERE_TOLD[untold[0]]})" if untold[0] in WHERE_TOLD else ""
        raise UserError(f"{source} does not tell the model's {untold[0]}: add --config.model.{untold[0]}=...{told}")
    return wanted


def _with_model(config: Config, options: Mapping[str, Any]) -> Config:
    """The config with other model options. UserError: the model's options class refuses them."""
    try:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **options))
    except ValueError as error:
        raise UserError(f"section model: {error}") from error


def _advice(family: Family, config: Config, found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A sentence with the overrides that would make the config fit, empty if there are none."""

    new = {key: value for key, value in found.items() if value is not None and value != getattr(config.model, key, None)}
    try:
        fits = new and not mismatches(family, abstract_model(_with_model(config, new).model), shapes)
    except UserError:
        fits = False
    overrides = " ".join(f"--config.model.{key}={_literal(value)}" for key, value in new.items())
    return f". It fits with {overrides}" if fits else ""


def _literal(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) and len(value) > 1 else str(value).replace(" ", "")


def _is_auto(argv: Sequence[str]) -> bool:
    return any(itertools.starmap(_names_auto, itertools.pairwise(argv)))


def _names_auto(before: str, argument: str) -> bool:
    return argument == "--config=auto" or (before, argument) == ("--config", "auto")


def _auto_config(argv: Sequence[str]) -> str:
    """The recipe in AUTO_CONFIGS for the first file on the command line; one that cannot be read is reported later."""

    for argument in argv[1:]:
        if Path(argument).is_file():
            with contextlib.suppress(UserError), open_tensors(argument) as file:
                return AUTO_CONFIGS[model_of(file.tensors), head_of(file.tensors)]
    return AUTO_CONFIGS["deq_transformer", None]


def _without_auto(argv: Sequence[str]) -> list[str]:
    """The command line with 'auto' replaced by the recipe it starts from, and `--to-torch` by `--to_torch`."""
    argv = ["--to_torch" if argument == "--to-torch" else argument for argument in argv]
    if not _is_auto(argv):
        return argv
    recipe, pairs = _auto_config(argv), itertools.pairwise(["", *argv])
    return [argument.replace("auto", recipe) if _names_auto(before, argument) else argument for before, argument in pairs]


if __name__ == "__main__":
    cli.run(main, _without_auto(sys.argv), positional=("SOURCE", "DIR"), flag_values=_FLAGS)
