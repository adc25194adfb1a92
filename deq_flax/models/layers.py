"""Transformer blocks in sequence, each with a memory of its own inputs, as in the Transformer-XL (Dai et al. 2019).

B batch, N layers, L length, M memory, K keys (M + L), D model features, J features of an injection (3 * heads * features of a
head).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deq_flax.nn.attention import position_encoding
from deq_flax.nn.transformer import Context, Memory, TransformerCell


class LayerMemory(NamedTuple):
    """The memory of every layer: what its attention sees of earlier segments. Right-aligned, of fixed size."""

    states_BNMD: jax.Array
    """Inputs of the layers."""
    length_B: jax.Array
    """Number of valid entries, int32: the last ones. The others are masked."""


Cells = Sequence[TransformerCell]


def fresh_memory(cells: Cells, batch_size: int, length: int, dtype: DTypeLike) -> LayerMemory:
    """The memory of `length` positions at the start of a stream: none of it is valid."""
    states_BNMD = jnp.zeros((batch_size, len(cells), length, cells[0].options.d_model), dtype)
    return LayerMemory(states_BNMD, jnp.zeros((batch_size,), jnp.int32))


class RemembersInputs:
    """The part of a language model whose layers, its `cells`, each have a memory of their own inputs."""

    def fresh_memory(self: Any, batch_size: int) -> LayerMemory:
        return fresh_memory(self.cells, batch_size, self.options.mem_len, self.embedding.tables_NE[0].dtype)


def layer_contexts(
    cells: Cells, x_BLD: jax.Array, memory: LayerMemory, keys: Sequence[jax.Array | None] | jax.Array
) -> tuple[Context, ...]:
    """The constants of all evaluations of the layers, for segments like x: memory, positions, a dropout mask for each key."""
    (batch_size, length, d_model), n_memory = x_BLD.shape, memory.states_BNMD.shape[2]
    positions_KD = position_encoding(n_memory + length, d_model, x_BLD.dtype)
    contexts = []
    for i, cell in enumerate(cells):
        nothing_11J = jnp.zeros((1, 1, 3 * cell.options.n_head * cell.options.d_head), x_BLD.dtype)
        own = Memory(memory.states_BNMD[:, i], nothing_11J, memory.length_B)
        masks = cell.draw_masks(keys[i], batch_size, length, n_memory)
        contexts.append(cell.context(nothing_11J, own, positions_KD, masks))
    return tuple(contexts)


def run_layers(cells: Cells, x_BLD: jax.Array, contexts: Sequence[Context]) -> tuple[jax.Array, list[jax.Array]]:
    """The output (B, L, D) of the layers in sequence, and the input (B, L, D) of each."""
    inputs = []
    for cell, context in zip(cells, contexts, strict=True):
        inputs.append(x_BLD)
        x_BLD = cell.evaluate(x_BLD, context)
    return x_BLD, inputs


def next_layer_memory(memory: LayerMemory, inputs: Sequence[jax.Array], count: jax.Array | None = None) -> LayerMemory:
    """The memory after a segment, without gradient: the last M of the old and new entries.

    Args:
      memory: the memory before the segment.
      inputs: the inputs of every layer, (B, L, D) each.
      count: number of positions of each sample's segment to read, (B,); None: all of them.
    """
    new_BNLD = jnp.stack(inputs, axis=1)
    states_BNMD = push(memory.states_BNMD, new_BNLD, axis=2, count=count)
    added, size = new_BNLD.shape[2] if count is None else count, memory.states_BNMD.shape[2]
    return lax.stop_gradient(LayerMemory(states_BNMD, jnp.minimum(memory.length_B + added, size)))


def push(held: jax.Array, new: jax.Array, *, axis: int, count: jax.Array | None) -> jax.Array:
    """The last entries of `held` followed by the first `count` of `new`, (B,), or None: all; as many as there are in `held`."""
    joined, size = jnp.concatenate([held, new], axis=axis), held.shape[axis]
    if count is None:
        return lax.slice_in_dim(joined, new.shape[axis], new.shape[axis] + size, axis=axis)
    return jax.vmap(lambda joined, count: lax.dynamic_slice_in_dim(joined, count, size, axis=axis - 1))(joined, count)
