"""A Transformer model of puzzles whose blocks are one application of f, after FPRM and Huginn.

B batch, S the axes of a puzzle's cells, L all of its cells, D features.
"""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from deq_flax.models.reasoner import Reasoner, ReasonerOptions
from deq_flax.nn.reasoning_block import BlockOptions, ReasoningBlock, angles


@dataclass(frozen=True, kw_only=True)
class AttentionReasonerOptions(BlockOptions, ReasonerOptions):
    """Options of an `AttentionReasoner`.

    Raises:
      ValueError: a value is out of range.
    """

    name: str = "attention_reasoner"
    blocks: int = 1
    """Blocks in sequence in an application of f."""
    cells: int = 0
    """Number of cells of a puzzle, for mixer cells, which fits one size only."""

    def __post_init__(self) -> None:
        BlockOptions.__post_init__(self)
        ReasonerOptions.__post_init__(self)
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if (self.mixer == "cells") != (self.cells > 0):
            raise ValueError(f"cells is the number of cells of a puzzle for mixer 'cells', else 0, not {self.cells}")


class AttentionReasoner(Reasoner):
    """f(z, x) = blocks(z + x), with the RMS norms of the blocks after their sums.

    Raises:
      ValueError: an option is out of range.
    """

    Options = AttentionReasonerOptions

    def __init__(self, options: AttentionReasonerOptions, *, rngs: nnx.Rngs):
        super().__init__(options, rngs=rngs)
        self.blocks = nnx.List([ReasoningBlock(options, cells=options.cells, rngs=rngs) for _ in range(options.blocks)])

    def evaluate(self, z: Any, x_BSD: jax.Array) -> Any:
        return self.transform(z + x_BSD)

    def transform(self, y_BSD: jax.Array) -> jax.Array:
        """Apply the blocks: (B, S, D) -> (B, S, D)."""
        batch, *cells, width = y_BSD.shape
        turns_LF = angles(self.options, cells)
        y_BLD = y_BSD.reshape(batch, -1, width)
        if self.options.cells not in (0, y_BLD.shape[1]):
            raise ValueError(f"the puzzles have {y_BLD.shape[1]} cells, but model.cells is {self.options.cells}")
        for block in self.blocks:
            y_BLD = block(y_BLD, turns_LF, self.dtype)
        return y_BLD.reshape(y_BSD.shape)
