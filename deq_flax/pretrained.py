"""A model from its checkpoint alone, without the data it was trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx

from deq_flax.checkpoints.checkpoints import load_meta, load_params
from deq_flax.errors import UserError
from deq_flax.models.deq_transformer import DEQTransformer
from deq_flax.models.mdeq import MDEQ
from deq_flax.models.transformer_xl import TransformerXL
from deq_flax.train.step import split_model

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "language": DEQTransformer,
    "explicit_language": TransformerXL,
    "classification": partial(MDEQ, head="classification"),
    "segmentation": partial(MDEQ, head="segmentation"),
}
"""By the name of the task."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What a checkpoint holds for use."""

    model: Any
    config: dict[str, Any]
    """As it was trained with; `model.vocab_size` is never 0."""
    meta: dict[str, Any]


def abstract_model(config: Mapping[str, Any]) -> Any:
    """The model that a config describes, its arrays shapes and types only. UserError: it describes none."""
    name = config["task"]
    if name not in MODELS:
        raise UserError(f"unknown task {name!r}; known: {', '.join(MODELS)}")
    try:
        return nnx.eval_shape(lambda: MODELS[name](**config["model"], rngs=nnx.Rngs(0)))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"section model: {error}") from error


def stored_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The config in a checkpoint's `meta`, its `model.vocab_size` taken from the arrays where it was left to the text."""
    try:
        config = meta["config"]
        if "vocab_size" not in config["model"] or config["model"]["vocab_size"]:
            return config
        tables = {name: x["shape"] for name, x in meta["arrays"]["params"].items() if name.startswith("embedding/tables_NE/")}
        return config | {"model": config["model"] | {"vocab_size": sum(shape[0] for shape in tables.values())}}
    except (KeyError, TypeError) as error:
        raise UserError("this checkpoint does not hold the config of a model: it was not written by this package") from error


def load_model(path: str | Path) -> Pretrained:
    """The model of a checkpoint with its weights (their running average, if one was kept).

    Args:
      path: a run's workdir or its checkpoints folder (the best checkpoint is taken), or the folder of one step.

    Raises:
      UserError: there is no checkpoint, it is damaged, or it was not written by this package.
    """
    meta = load_meta(path)
    config = stored_config(meta)
    graph, params, variables = split_model(abstract_model(config))
    restored = load_params(path, params, variables)
    return Pretrained(model=nnx.merge(graph, restored.weights, restored.variables), config=config, meta=meta)
