"""Language modelling: predict the next token, with memory carried from segment to segment.

B batch, L length.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_flax.data.text.corpus import load_text
from deq_flax.data.text.segments import EvalSegments, TrainSegments, iterate, segment_dataset
from deq_flax.models.deq_transformer import DEQTransformer
from deq_flax.models.transformer_xl import TransformerXL
from deq_flax.task import Batch, Batches, Controls, LossOutput, Metrics, Phase, average
from deq_flax.tasks.checks import check_least, check_model
from deq_flax.train.phases import EquilibriumRecipe, add_solver, ordered


class _TextTask:
    """What the tasks on a text share: all but how hidden states come about."""

    model_type: type = DEQTransformer

    def __init__(self, *, data: Mapping[str, Any], model: Mapping[str, Any]):
        self.batch_size, self.eval_batch_size = data["batch_size"], data["eval_batch_size"]
        self._seq_len, self._eval_seq_len = data["seq_len"], data["eval_seq_len"]
        check_least(data, 1, "batch_size", "seq_len", "eval_batch_size", "eval_seq_len")
        self.corpus = load_text(data["name"], data["path"], data["cache"], vocab_size=model["vocab_size"])
        self._model = dict(model) | {"vocab_size": model["vocab_size"] or self.corpus.vocab_size}
        TrainSegments(self.corpus.train, self.batch_size, self._seq_len)  # a text too short is refused now
        check_model(self.build_model)

    @property
    def words(self) -> Sequence[str] | None:
        return None if self.corpus.vocabulary is None else self.corpus.vocabulary.words

    def build_model(self, rngs: nnx.Rngs) -> Any:
        return self.model_type(**self._model, rngs=rngs)

    def train_batches(self, step: int, rows: slice | None = None) -> Iterator[Batch]:
        segments = TrainSegments(self.corpus.train, self.batch_size, self._seq_len, rows)
        return iterate(segment_dataset(segments).repeat(), step)

    def eval_batches(self, split: str, rows: slice | None = None) -> Batches:
        return EvalSegments(self.corpus.split(split), self.eval_batch_size, self._eval_seq_len, rows)

    def fresh_carry(self, model: Any, batch_size: int) -> Any:
        return model.fresh_memory(batch_size)

    def summary(self, split: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adds perplexities: the model's and, in evaluation, that of word frequencies alone."""
        summary = dict(metrics)
        if "loss" in metrics:
            summary["ppl"] = _ppl(metrics["loss"])
        if split != "train":
            summary["unigram_ppl"] = _ppl(self.corpus.unigram_nll(split))
        return ordered(summary, "loss", "ppl")

    def work(self, seconds_per_step: float) -> dict[str, float]:
        return {"tokens_per_second": self.batch_size * self._seq_len / seconds_per_step}


class LanguageTask(_TextTask):
    """A DEQ-Transformer on a text.

    Args:
      data, model, deq: these sections of the config. `model.vocab_size` 0 takes the text's.
      seed: decides which steps add the Jacobian loss, and their step limits.

    Raises:
      UserError: the text cannot be had, or a value makes no sense.
    """

    def __init__(self, *, data: Mapping[str, Any], model: Mapping[str, Any], deq: Mapping[str, Any], seed: int):
        self.recipe = EquilibriumRecipe(**deq, seed=seed)
        super().__init__(data=data, model=model)

    def phase(self, step: int) -> Phase:
        return self.recipe.phase(step)

    def controls(self, step: int) -> Controls:
        return self.recipe.controls(step)

    def loss(
        self,
        model: Any,
        batch: Batch,
        carry: Any,
        *,
        phase: Phase | None = None,
        controls: Controls | None = None,
        key: Any = None,
        probe: jax.Array | None = None,
    ) -> tuple[jax.Array, LossOutput]:
        """Mean negative log-likelihood of the targets that count, plus the Jacobian loss in phases that have it."""
        options = self.recipe.model_options(phase, controls, key, probe)
        output = model(batch["inputs"], _without_the_ended(carry, batch), **options)
        loss, metrics = _nll(model, output.hidden_BLD, batch)
        loss, metrics = add_solver(loss, metrics, output.stats, output.jacobian_loss, controls)
        return loss, LossOutput(output.memory, metrics)

    def spectral_radius(self, model: Any, batch: Batch, carry: Any, key: Any) -> jax.Array:
        """(B,) at the equilibria of a batch."""
        equation = model.equation(batch["inputs"], carry)
        return self.recipe.spectral_radius(equation.f, equation.z0_BLD, key)


class ExplicitLanguageTask(_TextTask):
    """A Transformer-XL on a text: layers instead of an equilibrium, to compare with. `LanguageTask` but for the section `deq`.

    Raises:
      UserError: the text cannot be had, or a value makes no sense.
    """

    model_type = TransformerXL

    def __init__(self, *, data: Mapping[str, Any], model: Mapping[str, Any], seed: int):
        super().__init__(data=data, model=model)

    def phase(self, step: int) -> Phase:
        return _Explicit()

    def controls(self, step: int) -> Controls:
        return Controls(max_steps=np.int32(0), jacobian_weight=np.float32(0))  # there is nothing to control

    def loss(
        self,
        model: Any,
        batch: Batch,
        carry: Any,
        *,
        phase: Phase | None = None,
        controls: Controls | None = None,
        key: Any = None,
        probe: jax.Array | None = None,
    ) -> tuple[jax.Array, LossOutput]:
        """Mean negative log-likelihood of the targets that count."""
        output = model(batch["inputs"], _without_the_ended(carry, batch), key=key)
        loss, metrics = _nll(model, output.hidden_BLD, batch)
        return loss, LossOutput(output.memory, metrics)


class _Explicit(Phase):
    def __str__(self) -> str:
        return "explicit layers"


def _without_the_ended(carry: Any, batch: Batch) -> Any:
    """The memory, empty where a stream starts."""
    return carry._replace(length_B=jnp.where(batch["fresh"], 0, carry.length_B))


def _nll(model: Any, hidden_BLD: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """Mean over the targets that count, and the same as a metric."""
    nll_BL = model.nll(hidden_BLD, batch["targets"]) * batch["mask"]
    total, count = jnp.sum(nll_BL), jnp.sum(batch["mask"])
    return total / jnp.maximum(count, 1.0), {"loss": average(total, count)}


def _ppl(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
