"""Turn weights of the original PyTorch code into a checkpoint of ours, or back.

  python -m deq_flax.convert SOURCE.pth DIR --config configs/wt103.py:VARIANT [--config.section.key=value ...]
  python -m deq_flax.convert SOURCE.pth DIR --config auto
  python -m deq_flax.convert DIR OUT.pth --to_torch

SOURCE is a state_dict: .pth, .pt or .pkl of torch.save, .safetensors, or .npz. DIR is then what a training run leaves:
`deq_flax.main --mode eval --workdir DIR` evaluates it, `--config.checkpoint.init_from=DIR` trains on from it, and
`deq_flax.generate --checkpoint DIR` writes with it. PyTorch is not needed. `--config auto` is the config of wt103, cifar10 or
cityscapes with the sizes of the file. What cannot be read off a file stays as that config has it: a language model's memory,
span and order of normalisation, an image model's groups of channels. How often an image model halves the resolution at first
must be given, as --config.model.downsample, where the file does not show it.
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from deq_flax import cli
from deq_flax.errors import UserError

_FLAGS = flags.FlagValues()  # of its own, so that this module can be imported beside other commands
_CONFIG = cli.config_flag(_FLAGS)
_TO_TORCH = flags.DEFINE_bool(
    "to_torch", False, "write a state_dict that the original code loads, from a checkpoint of ours", flag_values=_FLAGS
)

AUTO_CONFIGS = {"language": "wt103.py", "classification": "cifar10.py", "segmentation": "cityscapes.py"}
"""What `--config auto` begins from, by the task that the file is for."""


def main(source: str, destination: str) -> int:
    """The command."""
    if _TO_TORCH.value:
        count, names = to_torch(source, Path(destination))
        print(f"wrote {names} tensors, {count:,} parameters, to {destination}")
        return 0
    cli.require(_CONFIG.value is not None, "--config is missing: a config file, or auto")
    config = cli.config_to_kwargs(_CONFIG.value)
    flag: Any = _FLAGS["config"]
    given = {key.removeprefix("model.") for key in flag.override_values if key.startswith("model.")}
    count = convert(Path(source), Path(destination), config, auto=_auto_wanted(sys.argv), given=given)
    print(f"wrote {count:,} parameters to {destination}; evaluate them with --mode eval --workdir {destination}")
    return 0


def convert(
    source: Path, directory: Path, config: Mapping[str, Any], *, auto: bool = False, given: Collection[str] = ()
) -> int:
    """Write a checkpoint of the weights in `source`; returns how many parameters it has.

    Args:
      source: a file that `torch_checkpoint.open_tensors` reads.
      directory: for `checkpoints/0` and `config.json`.
      config: the resolved config as plain data. A `model.vocab_size` of 0 becomes that of the file.
      auto: take all options of the model that shapes tell from the file, but those in `given`.

    Raises:
      UserError: the file cannot be read or does not fit the config, or the directory is in use. Nothing has been written then.
    """
    from deq_flax.checkpoints.checkpoints import Checkpoints
    from deq_flax.checkpoints.stored_step import named_leaves
    from deq_flax.pretrained import abstract_model
    from deq_flax.torch_checkpoint import FAMILIES, convert_tensors, family_of, match, open_tensors
    from deq_flax.train.step import split_model

    _require_unused(directory)
    with open_tensors(source) as file:
        family_name = family_of(config["task"], file.shapes)
        family = FAMILIES[family_name]
        found = family.infer(file.shapes)
        config = _completed(config, found, source, auto=auto, given=given)
        try:
            model = abstract_model(config)
            problems = "; ".join(match(family, model, file.shapes))
        except UserError as error:
            problems = str(error)
        if problems:
            raise UserError(f"{source} does not fit the config: {problems}{_advice(family, config, found, file.shapes)}")
        arrays, buffers = convert_tensors(family, model, file)
    beside = {name: values.tolist() for name, values in buffers.items()}
    meta = {"config": config, "converted": {"file": source.name, "family": family_name, "buffers": beside}}
    _, params, variables = split_model(model)
    with Checkpoints(directory / "checkpoints", keep_latest=1, keep_best=0) as checkpoints:
        # Device arrays, because checkpoints copy those of NumPy.
        on_device = {path: jax.device_put(arrays.pop(path)) for path in list(arrays)}
        params, variables = (
            jax.tree.unflatten(jax.tree.structure(tree), [on_device[name] for name in named_leaves(tree)])
            for tree in (params, variables)
        )
        checkpoints.save(0, params, {"variables": variables}, {"step": 0}, meta)
    try:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    return sum(x.size for x in jax.tree.leaves(params))


def to_torch(checkpoint: str | Path, path: Path) -> tuple[int, int]:
    """Write the weights of a checkpoint as a state_dict; returns the numbers of parameters and of tensors.

    Raises:
      UserError: there is no checkpoint, there is no name for its weights, or the file cannot be written.
    """
    from deq_flax.checkpoints.checkpoints import load_meta, load_params
    from deq_flax.checkpoints.stored_step import named_leaves
    from deq_flax.pretrained import abstract_model, stored_config
    from deq_flax.torch_checkpoint import FAMILIES, export_tensors, family_of, write_state_dict
    from deq_flax.train.step import split_model

    meta = load_meta(checkpoint)
    config = stored_config(meta)
    model = abstract_model(config)
    templates = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), split_model(model)[1:])
    restored = load_params(checkpoint, *templates)
    arrays = named_leaves(restored.weights) | named_leaves(restored.variables)
    converted = meta.get("converted", {})
    buffers = {name: _buffer(values) for name, values in converted.get("buffers", {}).items()}
    family = FAMILIES[converted.get("family") or family_of(config["task"])]
    tensors = list(export_tensors(family, model, arrays, buffers))
    write_state_dict(path, tensors)
    return sum(leaf.size for leaf in jax.tree.leaves(restored.weights)), len(tensors)


def _buffer(values: Any) -> np.ndarray:
    """Of float32, as models are, or of whole numbers."""
    array = np.array(values)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _require_unused(directory: Path) -> None:
    if (directory / "checkpoints").exists() or (directory / "config.json").exists():
        raise UserError(f"{directory} holds a run already: choose another folder")


def _completed(
    config: Mapping[str, Any], found: Mapping[str, Any], source: Path, *, auto: bool, given: Collection[str]
) -> dict[str, Any]:
    """The config with what the file tells of the model, as far as that is asked for."""
    if auto:
        wanted = {key: value for key, value in found.items() if key not in given}
        if untold := [key for key, value in wanted.items() if value is None]:
            raise UserError(f"{source} does not tell the model's {untold[0]}: add --config.model.{untold[0]}=...")
    else:
        wanted = {} if config["model"].get("vocab_size") != 0 else {k: v for k, v in found.items() if k == "vocab_size"}
    return dict(config) | {"model": dict(config["model"]) | wanted}


def _advice(family: Any, config: Mapping[str, Any], found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The overrides that would make it fit, if there are such."""
    from deq_flax.pretrained import abstract_model
    from deq_flax.torch_checkpoint import match

    old = config["model"]
    new = {key: value for key, value in found.items() if value is not None and value != _as_read(old.get(key))}
    try:
        fits = new and not match(family, abstract_model(dict(config) | {"model": old | new}), shapes)
    except UserError:
        fits = False
    overrides = " ".join(f"--config.model.{key}={_literal(value)}" for key, value in new.items())
    return f". It fits with {overrides}" if fits else ""


def _as_read(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _literal(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) and len(value) > 1 else str(value).replace(" ", "")


def _is_auto(before: str, argument: str) -> bool:
    return argument == "--config=auto" or (before, argument) == ("--config", "auto")


def _auto_wanted(argv: Sequence[str]) -> bool:
    return any(itertools.starmap(_is_auto, itertools.pairwise(argv)))


def _task_of_source(argv: Sequence[str]) -> str:
    """The task of the first file on the command line; what cannot be read is complained of later."""
    from deq_flax.torch_checkpoint import open_tensors, task_of

    for argument in argv[1:]:
        if Path(argument).is_file():
            with contextlib.suppress(UserError), open_tensors(argument) as file:
                return task_of(file.tensors)
    return "language"


def _without_auto(argv: Sequence[str]) -> list[str]:
    """The command line with the config file that `auto` begins from, and with `--to-torch` spelled as flags are."""
    argv = ["--to_torch" if argument == "--to-torch" else argument for argument in argv]
    if not _auto_wanted(argv):
        return argv
    config = Path("configs") / AUTO_CONFIGS[_task_of_source(argv)]
    base = Path(__file__).resolve().parent.parent / config
    file = str(base if base.exists() else config)
    pairs = itertools.pairwise(["", *argv])
    return [argument.replace("auto", file) if _is_auto(before, argument) else argument for before, argument in pairs]


if __name__ == "__main__":
    cli.run(main, _without_auto(sys.argv), positional=("SOURCE", "DIR"), flag_values=_FLAGS)
