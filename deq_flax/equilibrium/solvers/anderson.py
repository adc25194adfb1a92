"""Anderson acceleration."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.solution import Solver


class AndersonState(NamedTuple):
    """The last `memory` iterates, in a ring; slot i holds iterate k with k mod memory = i."""

    mixed: jax.Array
    """(B, m, N): z_i + mixing g_i."""
    residuals: jax.Array
    """(B, m, N): g_i."""
    gram: jax.Array
    """(B, m, m): g_i . g_j, kept up to date by one row a step."""


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration, type II (Walker & Ni 2011, eq. 2.2; Bai et al. 2019, section 3.1.2).

    z_{k+1} = sum_i a_i (z_i + mixing g_i) over the last `memory` iterates, where a minimises
    ||sum_i a_i g_i||^2 subject to sum_i a_i = 1, with Tikhonov regularisation `ridge`. The Gram matrix is scaled to a unit
    diagonal before the ridge is added: what counts as small is then relative to each residual, and the method goes on
    improving where an absolute ridge of 1e-4 stalls at residuals of 1e-4.

    Args:
      tol, max_steps, stop, trace, sample_steps: see `Solver`.
      memory: how many iterates to combine; the state is 2 x memory copies of z.
      mixing: weight of the residuals in the combination; 1 combines the values of f.
      ridge: relative Tikhonov regularisation.

    Raises:
      ValueError: an option is out of range.
    """

    memory: int = 6
    mixing: float = 1.0
    ridge: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"Anderson: memory must be at least 1, not {self.memory}")
        if not 0 < self.mixing <= 1:
            raise ValueError(f"Anderson: mixing must be in (0, 1], not {self.mixing}")
        if not self.ridge >= 0:
            raise ValueError(f"Anderson: ridge must be at least 0, not {self.ridge}")

    def init(self, z: jax.Array) -> AndersonState:
        batch, size = z.shape
        slots = min(self.memory, self.max_steps)
        blank = jnp.zeros((batch, slots, size), z.dtype)
        return AndersonState(blank, blank, jnp.zeros((batch, slots, slots), z.dtype))

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: AndersonState) -> tuple[jax.Array, AndersonState]:
        slots = state.gram.shape[1]
        slot = k % slots
        # Both writes come before the reads: XLA then updates the buffers in place instead of copying them every step.
        mixed = jax.lax.dynamic_update_index_in_dim(state.mixed, z + self.mixing * g, slot, axis=1)
        residuals = jax.lax.dynamic_update_index_in_dim(state.residuals, g, slot, axis=1)
        row = jnp.einsum("bmn,bn->bm", residuals, g)
        gram = state.gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        weights = _weights(gram, jnp.arange(slots) <= k, self.ridge)
        return jnp.einsum("bm,bmn->bn", weights, mixed), AndersonState(mixed, residuals, gram)


def _weights(gram: jax.Array, used: jax.Array, ridge: float) -> jax.Array:
    """(B, m) weights that sum to one and minimise a^T gram a, over the slots in `used` (m,)."""
    slots = gram.shape[1]
    scale = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
    inverse = jnp.where(used[None] & (scale > 0), 1.0 / scale, 0.0)
    unit = gram * inverse[:, :, None] * inverse[:, None, :]
    unit = unit + (ridge + jnp.finfo(gram.dtype).eps) * jnp.eye(slots, dtype=gram.dtype)[None]
    # Slots without an iterate have an empty row and a zero right-hand side, so they get weight zero.
    a = inverse * _solve_positive(unit, inverse)
    return a / jnp.sum(a, axis=1, keepdims=True)


def _solve_positive(matrix: jax.Array, b: jax.Array) -> jax.Array:
    """(B, m): solutions of positive definite systems, by Gauss-Jordan elimination, which needs no pivoting for these.

    LAPACK's and cuSOLVER's calls are made for large matrices: for some thousand of 6 x 6 they take 4 to 5 times as long.
    """
    slots = matrix.shape[1]
    rows = jnp.concatenate([matrix, b[:, :, None]], axis=2)
    for i in range(slots):
        pivot = rows[:, i : i + 1] / rows[:, i : i + 1, i : i + 1]
        rows = jnp.where((jnp.arange(slots) == i)[None, :, None], pivot, rows - rows[:, :, i : i + 1] * pivot)
    return rows[:, :, -1]
