"""A model from its checkpoint alone, without the data it was trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from deq_flax.checkpoints.loading import load_meta, load_params
from deq_flax.config import Config
from deq_flax.config_files import stored_config
from deq_flax.models import abstract_model
from deq_flax.train.step import split_model


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model with its weights and its config."""

    model: Any
    config: Config
    """The config of its training; `model.vocab_size` is never 0."""
    meta: dict[str, Any]


def load_model(path: str | Path, config: Config | None = None) -> Pretrained:
    """The model of a checkpoint with its weights (their running average, if one was kept).

    Args:
      path: a run's workdir or its checkpoints folder (the best checkpoint is taken), or the folder of one step.
      config: config of the model to load the weights into; None: the checkpoint's own.

    Raises:
      UserError: there is no checkpoint, it is damaged, it was not written by this package, or does not fit `config`.
    """
    meta = load_meta(path)
    config = config or stored_config(meta)
    graphdef, params, variables = split_model(abstract_model(config.model))
    restored = load_params(path, params, variables)
    return Pretrained(model=nnx.merge(graphdef, restored.eval_params, restored.variables), config=config, meta=meta)
