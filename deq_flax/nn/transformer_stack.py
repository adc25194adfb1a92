"""Several Transformer blocks in sequence as one cell, after TorchDEQ's language model (Geng and Kolter 2023, arXiv:2310.18605).

B batch, L length, K keys, D model features, J features of an injection.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from deq_flax.nn.transformer import CellOptions, Context, Masks, Memory, TransformerCell


class TransformerStack(nnx.Module):
    """Several blocks in sequence as one cell. All share the injection and the memory; each has its own weights.

    Args:
      options: the options of each block.
      blocks: number of blocks.
    """

    def __init__(self, options: CellOptions, *, blocks: int, rngs: nnx.Rngs):
        self.blocks = nnx.List([TransformerCell(options, rngs=rngs) for _ in range(blocks)])

    def draw_masks(self, key: jax.Array | None, batch_size: int, length: int, n_memory: int) -> tuple[Masks, ...]:
        """Masks as in `TransformerCell.draw_masks` for each block; the mask of the positions is the same for all."""
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        masks = [block.draw_masks(k, batch_size, length, n_memory) for block, k in zip(self.blocks, keys, strict=True)]
        return tuple(mask._replace(positions_1D=masks[0].positions_1D) for mask in masks)

    def context(
        self,
        injection_BLJ: jax.Array,
        memory: Memory,
        positions_KD: jax.Array,
        masks: Sequence[Masks] | None = None,
    ) -> tuple[Context, ...]:
        """The constants of one solve as in `TransformerCell.context`, for each block."""
        masks = masks or [Masks()] * len(self.blocks)
        return tuple(
            block.context(injection_BLJ, memory, positions_KD, mask) for block, mask in zip(self.blocks, masks, strict=True)
        )

    def evaluate(self, z_BLD: jax.Array, context: Sequence[Context]) -> jax.Array:
        """f(z) through all blocks: (B, L, D) -> (B, L, D)."""
        for block, own in zip(self.blocks, context, strict=True):
            z_BLD = block.evaluate(z_BLD, own)
        return z_BLD
