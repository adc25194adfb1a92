"""A model from its checkpoint alone, without the data it was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from deq_flax.checkpoints.loading import load_meta, load_params
from deq_flax.config import Config, from_stored
from deq_flax.errors import UserError
from deq_flax.models import abstract_model
from deq_flax.train.step import split_model


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model with its weights and its config."""

    model: Any
    config: Config
    """The config of its training; `model.vocab_size` is never 0."""
    meta: dict[str, Any]


def stored_config(meta: Mapping[str, Any]) -> Config:
    """The config in a checkpoint's `meta`. UserError: there is none."""
    try:
        config = meta["config"]
        tables = [x["shape"] for name, x in meta["arrays"]["params"].items() if name.startswith("embedding/tables_NE/")]
    except (KeyError, TypeError) as error:
        raise UserError("this checkpoint does not hold the config of a model: it was not written by this package") from error
    return from_stored(config, vocab_size=sum(shape[0] for shape in tables))


def load_model(path: str | Path) -> Pretrained:
    """The model of a checkpoint with its weights (their running average, if one was kept).

    Args:
      path: a run's workdir or its checkpoints folder (the best checkpoint is taken), or the folder of one step.

    Raises:
      UserError: there is no checkpoint, it is damaged, or it was not written by this package.
    """
    meta = load_meta(path)
    config = stored_config(meta)
    graphdef, params, variables = split_model(abstract_model(config.model))
    restored = load_params(path, params, variables)
    return Pretrained(model=nnx.merge(graphdef, restored.eval_params, restored.variables), config=config, meta=meta)
