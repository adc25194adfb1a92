"""The common part of Transformer language models: options, embedding, softmax, and the dropout of both.

B batch, L length, D model features, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx

from deq_flax.models.model import LanguageModel, ModelOptions
from deq_flax.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from deq_flax.nn.dropout import apply_mask, draw_mask
from deq_flax.nn.precision import compute_dtype
from deq_flax.nn.transformer import CellOptions

OUTPUT_DROPOUT = {"tokens": (True, True, False), "features": (True, False, True), "none": None}
"""For each of the axes (B, L, D) of the hidden states, whether the output dropout mask varies along it."""


@dataclass(frozen=True, kw_only=True)
class TransformerOptions(CellOptions, ModelOptions):
    """Options of a Transformer language model.

    Raises:
      ValueError: a value is out of range.
    """

    name: str = "deq_transformer"
    vocab_size: int = 0
    """Words of the vocabulary; 0 in a config: as many as the corpus has."""
    d_embed: int
    """Features of the embedding of the most frequent words."""
    cutoffs: tuple[int, ...] = ()
    """First word of each cluster of rarer words in the adaptive embedding and softmax; (): one softmax over all words."""
    div_value: int = 1
    """Ratio of the embedding features of successive clusters; 1: all clusters share one table of d_embed features."""
    blocks: int = 1
    """Transformer blocks in sequence: in f of an equilibrium model, or the layers of transformer_xl."""
    mem_len: int = 0
    """Positions of memory carried from segment to segment; 0: none."""
    output_dropout: Literal["tokens", "features", "none"] = "tokens"
    """Dropout of the hidden states: tokens drops whole tokens, as published; features drops features of all tokens; none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cutoffs", tuple(self.cutoffs))
        super().__post_init__()
        if self.output_dropout not in OUTPUT_DROPOUT:
            known = ", ".join(sorted(OUTPUT_DROPOUT))
            raise ValueError(f"unknown output_dropout {self.output_dropout!r}; known: {known}")
        if self.d_model % 2:
            raise ValueError(f"d_model must be even for sinusoidal positions, got {self.d_model}")
        if self.mem_len < 0:
            raise ValueError(f"mem_len must not be negative, got {self.mem_len}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")


class TransformerLanguageModel(LanguageModel):
    """Adaptive embedding and adaptive softmax with tied weights; a subclass computes the hidden states in between.

    The subclass calls `tie` once its own parameters are drawn: the order in which parameters are drawn decides their values.
    """

    Options = TransformerOptions

    def __init__(self, options: TransformerOptions, *, rngs: nnx.Rngs):
        self.options = options
        self.dtype = compute_dtype(options.dtype)
        self.embedding = AdaptiveEmbedding(
            options.vocab_size,
            options.d_embed,
            options.d_model,
            cutoffs=options.cutoffs,
            div_value=options.div_value,
            rngs=rngs,
        )

    def tie(self, rngs: nnx.Rngs) -> None:
        """Make the softmax, whose weights are the embedding's."""
        self.softmax = AdaptiveSoftmax(self.embedding, dtype=self.options.dtype, rngs=rngs)

    def embed(self, tokens_BL: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Embed tokens as (B, L, D); given a key, with dropout of the same features at all positions."""
        x_BLD = self.embedding(tokens_BL, self.dtype)
        mask_B1D = draw_mask(key, self.options.dropout, (x_BLD.shape[0], 1, x_BLD.shape[2]), x_BLD.dtype)
        return apply_mask(x_BLD, mask_B1D)

    def drop_output(self, z_BLD: jax.Array, key: jax.Array | None) -> jax.Array:
        """The hidden states (B, L, D) that the softmax sees; given a key, with dropout."""
        varies = OUTPUT_DROPOUT[self.options.output_dropout]
        if varies is None:
            return z_BLD
        shape = tuple(size if along else 1 for size, along in zip(z_BLD.shape, varies, strict=True))
        return apply_mask(z_BLD, draw_mask(key, self.options.dropout, shape, z_BLD.dtype))

    def nll(self, hidden_BLD: jax.Array, targets_BL: jax.Array) -> jax.Array:
        return self.softmax.nll(hidden_BLD, targets_BL)

    def log_probabilities(self, hidden_BLD: jax.Array) -> jax.Array:
        return self.softmax.log_probabilities(hidden_BLD)
