"""Anderson acceleration."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.loop import Solver, check_options
from deq_flax.equilibrium.shards import total
from deq_flax.equilibrium.solution import scale_of


class AndersonState(NamedTuple):
    """The last `memory` iterates, in a ring; slot i holds iterate k with k mod memory = i."""

    relaxed: jax.Array
    """(B, m, N): z_i + relaxation g_i."""
    residuals: jax.Array
    """(B, m, N): g_i in units of its scale."""
    gram: jax.Array
    """(B, m, m): their inner products; each step replaces one row and column."""
    scales: jax.Array
    """(B, m): a power of two near the norm of each g_i."""


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration, type II (Walker & Ni 2011, eq. 2.2; Bai et al. 2019, section 3.1.2).

    z_{k+1} = sum_i a_i (z_i + relaxation g_i) over the last `memory` iterates, where g_i = f(z_i) - z_i and a minimizes
    ||sum_i a_i g_i||^2 subject to sum_i a_i = 1, with Tikhonov regularization `ridge`. The Gram matrix is scaled to a unit
    diagonal before the ridge is added: the ridge is then relative to each residual, and the method goes on improving where an
    absolute ridge of 1e-4 stalls at residuals of 1e-4.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be.
      ValueError: an option is out of range.
    """

    memory: int = 6
    """Iterates that are combined. Memory: 2 x as many copies of z."""
    relaxation: float = 1.0
    """Weight of f(z) against z in the combined iterates, in (0, 1]; 1 combines values of f alone."""
    restart: bool = False
    """When `memory` iterates are held, go on from the newest third and the next one, where the published algorithm drops the
    oldest in each step. Solves more hard problems (benchmarks/battery.py), but a DEQ-Transformer limited to 16 evaluations took
    more of them and reached a higher perplexity."""
    ridge: float = 1e-4
    """Tikhonov regularization of the combination's weights, relative to the squared residuals."""

    def __post_init__(self):
        super().__post_init__()
        check_options(self, memory="[1, inf)", relaxation="(0, 1]", ridge="[0, inf)")

    def init(self, z: jax.Array) -> AndersonState:
        batch, size = z.shape
        slots = min(self.memory, self.max_steps)
        blank = jnp.zeros((batch, slots, size), z.dtype)
        return AndersonState(blank, blank, jnp.zeros((batch, slots, slots), z.dtype), jnp.ones((batch, slots), z.dtype))

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: AndersonState) -> tuple[jax.Array, AndersonState]:
        slots = state.gram.shape[1]
        slot = k % slots
        scale = scale_of(g, self.axis_name)
        unit = g / scale
        # Both writes come before the reads: XLA then updates the buffers in place instead of copying them every step.
        relaxed = jax.lax.dynamic_update_index_in_dim(state.relaxed, z + self.relaxation * g, slot, axis=1)
        residuals = jax.lax.dynamic_update_index_in_dim(state.residuals, unit, slot, axis=1)
        row = total(jnp.einsum("bmn,bn->bm", residuals, unit), self.axis_name)
        gram = state.gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        scales = jax.lax.dynamic_update_index_in_dim(state.scales, scale[:, 0], slot, axis=1)
        age = (slot - jnp.arange(slots, dtype=jnp.int32)) % slots
        weights = _weights(gram, scales / scale, age < self._window(k, slots), self.ridge)
        return jnp.einsum("bm,bmn->bn", weights, relaxed), AndersonState(relaxed, residuals, gram, scales)

    def _window(self, k: jax.Array, slots: int) -> jax.Array:
        """Return the number of newest iterates that are combined in step k."""
        if not self.restart:
            return jnp.minimum(k + 1, slots)
        kept = min(slots, max(2, 1 + slots // 3))
        return jnp.where(k < slots, k + 1, kept + (k - slots) % (slots + 1 - kept))


def _weights(gram: jax.Array, scales: jax.Array, used: jax.Array, ridge: float) -> jax.Array:
    """Return weights (B, m) that sum to one and minimize |sum_i a_i g_i|^2, over the slots in `used` (m,).

    `gram` has the inner products of g_i / scales_i; scales (B, m) are relative to that of the newest.
    """
    slots = gram.shape[1]
    size = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
    inverse = jnp.where(used[None] & (size > 0), 1.0 / size, 0.0)
    unit = gram * inverse[:, :, None] * inverse[:, None, :]
    unit = unit + (ridge + jnp.finfo(gram.dtype).eps) * jnp.eye(slots, dtype=gram.dtype)[None]
    # Slots without an iterate have an empty row and a zero right-hand side, so they get weight zero.
    inverse = inverse / scales
    a = inverse * _solve_positive(unit, inverse)
    return a / jnp.sum(a, axis=1, keepdims=True)


def _solve_positive(matrix: jax.Array, b: jax.Array) -> jax.Array:
    """Solve positive definite systems, (B, m, m) and (B, m), by Gauss-Jordan elimination, which needs no pivoting for these.

    LAPACK's and cuSOLVER's routines are made for large matrices: on thousands of 6 x 6 systems they take 4 to 5 times as long.
    """
    slots = matrix.shape[1]
    rows = jnp.concatenate([matrix, b[:, :, None]], axis=2)
    for i in range(slots):
        pivot = rows[:, i : i + 1] / rows[:, i : i + 1, i : i + 1]
        rows = jnp.where((jnp.arange(slots) == i)[None, :, None], pivot, rows - rows[:, :, i : i + 1] * pivot)
    return rows[:, :, -1]
