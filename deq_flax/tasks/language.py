"""Language modeling: predict the next token, with memory carried from segment to segment.

B batch, L length.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.data.loading import iterate, repeat_batches
from deq_flax.data.text.corpus import TextOptions, load_text
from deq_flax.data.text.segments import EvalSegments, TrainSegments
from deq_flax.equilibrium.solution import Solve
from deq_flax.models import abstract_model, build_model
from deq_flax.task import Batch, Batches, LossOutput, average


class LanguageTask:
    """A language model on a text.

    Args:
      data: section `data` of the config.
      model: section `model`, the options of a language model; `vocab_size` 0 takes the text's.
      seed: unused: the segments of a text come in order.

    Raises:
      UserError: the text cannot be read, or there is no such model.
    """

    Data, Loss, kind = TextOptions, None, "language"

    def __init__(self, data: TextOptions, model: Any, *, seed: int = 0):
        self._data = data
        self.batch_size, self.eval_batch_size = data.batch_size, data.eval_batch_size
        self.corpus = load_text(data, model.vocab_size)
        self.model_options = dataclasses.replace(model, vocab_size=model.vocab_size or self.corpus.vocab_size)
        TrainSegments(self.corpus.train, self.batch_size, data.seq_len)  # a text that is too short is refused now
        abstract_model(self.model_options)
        self._bytes_per_token = functools.cache(self.corpus.bytes_per_token)

    @property
    def vocabulary_file(self) -> tuple[str, str] | None:
        return self.corpus.vocabulary_file

    def build_model(self, rngs: nnx.Rngs) -> Any:
        return build_model(self.model_options, rngs=rngs)

    def train_batches(self, step: int, rows: slice | None = None) -> Iterator[Batch]:
        segments = TrainSegments(self.corpus.train, self.batch_size, self._data.seq_len, rows)
        return iterate(repeat_batches(segments), step)

    def eval_batches(self, split: str, rows: slice | None = None) -> Batches:
        return EvalSegments(self.corpus.split(split), self.eval_batch_size, self._data.eval_seq_len, rows)

    def fresh_carry(self, model: Any, batch_size: int) -> Any:
        return model.fresh_memory(batch_size)

    def equation(self, model: Any, batch: Batch, carry: Any) -> tuple[Callable[[Any], Any], Any]:
        equation = model.equation(batch["inputs"], carry)
        return equation.f, equation.z0_BLD

    def loss(
        self, model: Any, batch: Batch, carry: Any, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, LossOutput]:
        """Mean negative log-likelihood of the targets that count, in nats."""
        memory = carry._replace(length_B=jnp.where(batch["fresh"], 0, carry.length_B))  # empty where a stream starts
        output = model(batch["inputs"], memory, solve=solve, key=key)
        nll_BL = model.nll(output.hidden_BLD, batch["targets"]) * batch["mask"]
        total, count = jnp.sum(nll_BL), jnp.sum(batch["mask"])
        metrics = {"loss": average(total, count)}
        return total / jnp.maximum(count, 1.0), LossOutput(output.memory, metrics, output.stats, output.jacobian_loss)

    def summary(self, split: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Loss and perplexity; in evaluation also bits per byte, and the perplexity of word frequencies as a baseline."""
        summary = {"loss": metrics["loss"], "ppl": _ppl(metrics["loss"])} if "loss" in metrics else {}
        if split != "train":
            bytes_per_token = self._bytes_per_token(split)
            if summary and bytes_per_token:
                summary["bits_per_byte"] = metrics["loss"] / math.log(2) / bytes_per_token
            summary["unigram_ppl"] = _ppl(self.corpus.unigram_nll(split))
        return summary

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        return {"tokens_per_second": self.batch_size * self._data.seq_len / seconds_per_step}


def _ppl(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
