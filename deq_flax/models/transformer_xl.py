"""The Transformer-XL language model (Dai et al. 2019, arXiv:1901.02860): what a DEQ-Transformer is to be compared with.

Blocks, embedding, softmax and dropout masks are those of the DEQ-Transformer; but there are several blocks, each with weights
and a memory of its own, and nothing is injected into them.

B batch, N layers, L length, M memory, D model features, J features of an injection (3 * heads * features of a head).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_flax.models.language_model import WordModel
from deq_flax.nn.attention import position_encoding
from deq_flax.nn.transformer import Memory, TransformerCell


class LayerMemory(NamedTuple):
    """What the attention of each layer sees of earlier segments. Right-aligned, of fixed size."""

    states_BNMD: jax.Array
    """Inputs of the layers."""
    length_B: jax.Array
    """int32, how many of the last entries are valid; the others are masked."""


class LayeredOutput(NamedTuple):
    """What the model makes of one segment."""

    hidden_BLD: jax.Array
    memory: LayerMemory


class TransformerXL(WordModel):
    """Adaptive embedding, Transformer blocks one after the other, and adaptive softmax with tied weights.

    Args:
      n_head, d_head, d_inner, pre_norm, affine_norm, weight_norm, local_size, attention_dropout: see `TransformerCell`.
      blocks: how many.
      d_model, dropout, dtype, words: see `WordModel`.

    Raises:
      ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        d_model,
        n_head,
        d_head,
        d_inner,
        blocks=1,
        pre_norm=False,
        affine_norm=False,
        weight_norm=True,
        local_size=0,
        dropout=0.0,
        attention_dropout=0.0,
        dtype="float32",
        rngs,
        **words,
    ):
        super().__init__(d_model=d_model, dropout=dropout, dtype=dtype, rngs=rngs, **words)
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self.injection_width = 3 * n_head * d_head
        self.cells = nnx.List(
            [
                TransformerCell(
                    d_model,
                    n_head=n_head,
                    d_head=d_head,
                    d_inner=d_inner,
                    pre_norm=pre_norm,
                    affine_norm=affine_norm,
                    weight_norm=weight_norm,
                    local_size=local_size,
                    dropout=dropout,
                    attention_dropout=attention_dropout,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(blocks)
            ]
        )
        self.tie(dtype, rngs)

    def fresh_memory(self, batch_size):
        """Memory at the start of a stream: nothing valid."""
        dtype = self.embedding.tables_NE[0].dtype
        states_BNMD = jnp.zeros((batch_size, len(self.cells), self.mem_len, self.d_model), dtype)
        return LayerMemory(states_BNMD, jnp.zeros((batch_size,), jnp.int32))

    def __call__(self, tokens_BL, memory, *, key=None):
        """Hidden states of one segment, to be handed to `nll`, and the memory for the next.

        Args:
          tokens_BL: int token ids.
          memory: from `fresh_memory` or from the segment before.
          key: draws the dropout masks; nothing is random without it.
        """
        keys = [None] * (len(self.cells) + 2) if key is None else jax.random.split(key, len(self.cells) + 2)
        x_BLD = self.embed(tokens_BL, keys[0])
        (batch_size, length), n_memory = tokens_BL.shape, self.mem_len
        positions_KD = position_encoding(n_memory + length, self.d_model, x_BLD.dtype)
        nothing_11J = jnp.zeros((1, 1, self.injection_width), x_BLD.dtype)
        inputs = []
        for i, cell in enumerate(self.cells):
            inputs.append(x_BLD)
            own = Memory(memory.states_BNMD[:, i], nothing_11J, memory.length_B)
            masks = cell.draw_masks(keys[1 + i], batch_size, length, n_memory)
            x_BLD = cell.evaluate(x_BLD, cell.context(nothing_11J, own, positions_KD, masks))
        states_BNMD = jnp.concatenate([memory.states_BNMD, jnp.stack(inputs, axis=1)], axis=2)[:, :, length:]
        valid_B = jnp.minimum(memory.length_B + length, n_memory)
        following = lax.stop_gradient(LayerMemory(states_BNMD, valid_B))
        return LayeredOutput(self.drop_output(x_BLD, keys[-1]), following)
