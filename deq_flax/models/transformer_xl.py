"""The Transformer-XL language model (Dai et al. 2019, arXiv:1901.02860): the explicit counterpart of the DEQ-Transformer.

Blocks, embedding, softmax and dropout masks are those of the DEQ-Transformer, but there are several blocks, each with its own
weights and memory, and nothing is injected into them.

B batch, N layers, L length, M memory, K keys (M + L), D model features, J features of an injection (3 * heads * features of a
head).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_flax.equilibrium.solution import Solve
from deq_flax.models.language_model import TransformerLanguageModel, TransformerOptions
from deq_flax.models.model import LanguageOutput
from deq_flax.nn.attention import position_encoding
from deq_flax.nn.transformer import Memory, TransformerCell


class LayerMemory(NamedTuple):
    """The memory of every layer: what its attention sees of earlier segments. Right-aligned, of fixed size."""

    states_BNMD: jax.Array
    """Inputs of the layers."""
    length_B: jax.Array
    """Number of valid entries, int32: the last ones. The others are masked."""


class TransformerXL(TransformerLanguageModel):
    """Adaptive embedding, Transformer blocks in sequence, and adaptive softmax.

    Raises:
      ValueError: an option is out of range.
    """

    has_equilibrium = False

    def __init__(self, options: TransformerOptions, *, rngs: nnx.Rngs):
        super().__init__(options, rngs=rngs)
        self.cells = nnx.List([TransformerCell(options, rngs=rngs) for _ in range(options.blocks)])
        self.tie(rngs)

    def fresh_memory(self, batch_size: int) -> LayerMemory:
        dtype = self.embedding.tables_NE[0].dtype
        states_BNMD = jnp.zeros((batch_size, len(self.cells), self.options.mem_len, self.options.d_model), dtype)
        return LayerMemory(states_BNMD, jnp.zeros((batch_size,), jnp.int32))

    def __call__(
        self, tokens_BL: jax.Array, memory: LayerMemory, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> LanguageOutput:
        keys = [None] * (len(self.cells) + 2) if key is None else jax.random.split(key, len(self.cells) + 2)
        x_BLD = self.embed(tokens_BL, keys[0])
        (batch_size, length), n_memory = tokens_BL.shape, self.options.mem_len
        positions_KD = position_encoding(n_memory + length, self.options.d_model, x_BLD.dtype)
        nothing_11J = jnp.zeros((1, 1, 3 * self.options.n_head * self.options.d_head), x_BLD.dtype)
        inputs = []
        for i, cell in enumerate(self.cells):
            inputs.append(x_BLD)
            own = Memory(memory.states_BNMD[:, i], nothing_11J, memory.length_B)
            masks = cell.draw_masks(keys[1 + i], batch_size, length, n_memory)
            x_BLD = cell.evaluate(x_BLD, cell.context(nothing_11J, own, positions_KD, masks))
        states_BNMD = jnp.concatenate([memory.states_BNMD, jnp.stack(inputs, axis=1)], axis=2)[:, :, length:]
        valid_B = jnp.minimum(memory.length_B + length, n_memory)
        following = lax.stop_gradient(LayerMemory(states_BNMD, valid_B))
        return LanguageOutput(self.drop_output(x_BLD, keys[-1]), following, stats=None, jacobian_loss=None)
