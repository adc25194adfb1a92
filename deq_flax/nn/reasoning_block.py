"""The block of models of recurrent depth: cells exchange information, then each is transformed; RMS norms after both sums.

B batch, L cells, H heads, E features of a head, D features, F inner features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from deq_flax.nn.linear import Linear
from deq_flax.nn.normalization import rms_norm
from deq_flax.nn.precision import contract
from deq_flax.nn.rotary import rotary_angles, rotate

SCORES_AT_ONCE = 2**23
"""Scores of attention that are computed at once, if one sample has no more: 32 MB, which a TPU's vector memory holds."""


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Options of a `ReasoningBlock`.

    Raises:
      ValueError: a value is out of range.
    """

    width: int
    """Features of a cell's state."""
    heads: int = 1
    """Attention heads."""
    expansion: float = 4.0
    """Inner features of the gated layers over their features, times 3/2: they have three kernels instead of two."""
    inner_multiple: int = 8
    """The inner features are rounded up to a multiple of this number; 256 in HRM and TRM."""
    mixer: Literal["attention", "cells"] = "attention"
    """Exchange of information between cells: attention, or a gated layer over all cells of a puzzle of one size."""
    positions: Literal["none", "sequence", "grid"] = "sequence"
    """Rotary positions of attention: none, of the cells row by row, or of rows and columns."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, both at least 1, got {self.width} and {self.heads}")
        if not self.expansion > 0 or self.inner_multiple < 1:
            raise ValueError(
                f"expansion must be positive and inner_multiple at least 1, got {self.expansion} and {self.inner_multiple}"
            )


class GatedLayer(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): outer(silu(gate(x)) * inner(x)), without biases, over the last axis.

    The inner features are 2/3 `expansion` times as many, rounded up to a multiple of `multiple`.
    """

    def __init__(self, width: int, expansion: float, multiple: int, *, rngs: nnx.Rngs):
        inner = -(-round(expansion * width * 2 / 3) // multiple) * multiple
        self.gate = _linear(width, inner, rngs)
        self.inner = _linear(width, inner, rngs)
        self.outer = _linear(inner, width, rngs)

    def __call__(self, x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """(..., D) -> (..., D); `dtype` as in `contract`."""
        return self.outer(jax.nn.silu(self.gate(x, dtype)) * self.inner(x, dtype), dtype)


class Attention(nnx.Module):
    """Softmax attention of every cell to every cell."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.query_key_value = _linear(width, 3 * width, rngs)
        self.out = _linear(width, width, rngs)

    def __call__(self, x_BLD: jax.Array, angles_LF: np.ndarray | None, dtype: DTypeLike | None = None) -> jax.Array:
        """(B, L, D) -> (B, L, D); `angles_LF` of `rotary_angles`, None: no positions; `dtype` as in `contract`."""
        batch, length, width = x_BLD.shape
        heads_3BLHE = jnp.moveaxis(
            self.query_key_value(x_BLD, dtype).reshape(batch, length, 3, self.heads, width // self.heads), 2, 0
        )
        query_BLHE, key_BLHE, value_BLHE = heads_3BLHE
        if angles_LF is not None:
            query_BLHE, key_BLHE = rotate(query_BLHE, angles_LF), rotate(key_BLHE, angles_LF)
        attended_BLHE = attend(query_BLHE, key_BLHE, value_BLHE, dtype)
        return self.out(attended_BLHE.reshape(batch, length, width), dtype)


def attend(query_BLHE: jax.Array, key_BLHE: jax.Array, value_BLHE: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Softmax attention of every cell to every cell, (B, L, H, E); `dtype` as in `contract`.

    The samples of a batch that has more than `SCORES_AT_ONCE` scores are attended one after another, or as many at a time as
    have no more. Their scores are not kept, but computed again for the gradient.
    """
    batch, length, heads, _ = query_BLHE.shape
    samples = max(1, SCORES_AT_ONCE // (heads * length**2))
    if samples >= batch:
        return _attend(query_BLHE, key_BLHE, value_BLHE, dtype)[0]

    @jax.checkpoint
    def attend_sample(qkv_LHE: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _attend_few(*(x_LHE[None] for x_LHE in qkv_LHE), dtype)[0]

    return lax.map(attend_sample, (query_BLHE, key_BLHE, value_BLHE), batch_size=samples)


def _attend(
    query_BLHE: jax.Array, key_BLHE: jax.Array, value_BLHE: jax.Array, dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array]:
    """The attended values, (B, L, H, E), and the weights, (B, H, L, L)."""
    scores_BHLL = contract("blhe,bmhe->bhlm", query_BLHE, key_BLHE, dtype) * query_BLHE.shape[-1] ** -0.5
    weights_BHLL = jax.nn.softmax(scores_BHLL)
    return contract("bhlm,bmhe->blhe", weights_BHLL, value_BLHE, dtype), weights_BHLL


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _attend_few(query_BLHE: jax.Array, key_BLHE: jax.Array, value_BLHE: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return _attend(query_BLHE, key_BLHE, value_BLHE, dtype)[0]


@_attend_few.defjvp
def _attend_few_jvp(dtype: DTypeLike | None, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The softmax's own sum enters through the attended values: transposed, that is a sum over the features of a head instead of
    # over all keys (Dao et al. 2022, arXiv:2205.14135, appendix B.2), and the weights are read once less often.
    (query_BLHE, key_BLHE, value_BLHE), (query_dot, key_dot, value_dot) = primals, tangents
    attended_BLHE, weights_BHLL = _attend(query_BLHE, key_BLHE, value_BLHE, dtype)
    scores_dot = contract("blhe,bmhe->bhlm", query_dot, key_BLHE, dtype)
    scores_dot += contract("blhe,bmhe->bhlm", query_BLHE, key_dot, dtype)
    weights_dot = weights_BHLL * scores_dot * query_BLHE.shape[-1] ** -0.5  # of weights that are divided by a constant sum
    attended_dot = contract("bhlm,bmhe->blhe", weights_dot, value_BLHE, dtype)
    attended_dot += contract("bhlm,bmhe->blhe", weights_BHLL, value_dot, dtype)
    return attended_BLHE, attended_dot - weights_dot.sum(-1).swapaxes(1, 2)[..., None] * attended_BLHE


class ReasoningBlock(nnx.Module):
    """x <- norm(x + mixer(x)); x <- norm(x + SwiGLU(x)) (Wang et al. 2025, HRM, arXiv:2506.21734).

    Args:
      cells: the number of cells of a puzzle, for mixer 'cells' (Jolicoeur-Martineau 2025, TRM, arXiv:2510.04871).
    """

    def __init__(self, options: BlockOptions, *, cells: int, rngs: nnx.Rngs):
        self.mixer: Attention | GatedLayer
        if options.mixer == "attention":
            self.mixer = Attention(options.width, options.heads, rngs=rngs)
        else:
            self.mixer = GatedLayer(cells, options.expansion, options.inner_multiple, rngs=rngs)
        self.gated = GatedLayer(options.width, options.expansion, options.inner_multiple, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, angles_LF: np.ndarray | None, dtype: DTypeLike | None = None) -> jax.Array:
        """(B, L, D) -> (B, L, D); arguments as of `Attention`."""
        if isinstance(self.mixer, Attention):
            mixed_BLD = self.mixer(x_BLD, angles_LF, dtype)
        else:
            mixed_BLD = self.mixer(x_BLD.swapaxes(1, 2), dtype).swapaxes(1, 2)
        x_BLD = rms_norm(x_BLD + mixed_BLD)
        return rms_norm(x_BLD + self.gated(x_BLD, dtype))


def angles(options: BlockOptions, shape: Sequence[int]) -> np.ndarray | None:
    """The angles (L, F) of a puzzle's cells by `options.positions`; None without positions.

    Raises:
      ValueError: the features of a head cannot be divided so.
    """
    if options.positions == "none" or options.mixer != "attention":
        return None
    cells = tuple(shape) if options.positions == "grid" else (int(np.prod(shape)),)
    return rotary_angles(cells, options.width // options.heads)


def _linear(d_in: int, d_out: int, rngs: nnx.Rngs) -> Linear:
    return Linear(d_in, d_out, use_bias=False, init_std=d_in**-0.5, rngs=rngs)
