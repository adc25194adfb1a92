"""Anderson acceleration."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.loop import Solver, change_where, check_options
from deq_flax.equilibrium.shards import AxisName, total
from deq_flax.equilibrium.solution import decomposed, scale_of
from deq_flax.equilibrium.solvers.history import combined, dots


class AndersonState(NamedTuple):
    """The iterates that are combined: the last `memory` in a ring; with `restart`, what the last one kept and those since."""

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
    """When `memory` iterates are held, make room for a third of them at once, where the published algorithm drops the oldest
    in each step. If the newest has the smallest residual of all, it is kept beside the leading directions of the others, as
    `Broyden` does; if not, the iteration wanders, and the newest third is kept. Solves more hard problems
    (benchmarks/battery.py) than sliding."""
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
        restart, kept = self.restart and slots > 1, _kept(slots)
        slot = jnp.where(k < slots, k, kept + (k - slots) % (slots - kept)) if restart else k % slots
        scale = scale_of(g, self.axis_name)
        unit = g / scale
        # Both writes come before the reads: XLA then updates the buffers in place instead of copying them every step.
        relaxed = jax.lax.dynamic_update_index_in_dim(state.relaxed, z + self.relaxation * g, slot, axis=1)
        residuals = jax.lax.dynamic_update_index_in_dim(state.residuals, unit, slot, axis=1)
        row = total(dots(residuals, unit), self.axis_name)
        gram = state.gram.at[:, slot, :].set(row).at[:, :, slot].set(row)
        scales = jax.lax.dynamic_update_index_in_dim(state.scales, scale[:, 0], slot, axis=1)
        used = jnp.arange(slots, dtype=jnp.int32) <= (slot if restart else k)
        weights = _weights(gram, scales / scale, used, self.ridge)
        value, state = combined(relaxed, weights), AndersonState(relaxed, residuals, gram, scales)
        if restart:
            state = change_where(slot == slots - 1, lambda state: _restarted(state, self.axis_name), state)
        return value, state


def _kept(slots: int) -> int:
    """Slots that a restart fills."""
    return min(slots - 1, (2 * slots + 1) // 3)


def _restarted(state: AndersonState, axis_name: AxisName | None) -> AndersonState:
    """Return a state of which the first `_kept` slots are filled, from one that is full; its newest iterate is the last.

    Let the columns of S be the changes of g from the newest iterate to the others, and those of Y the changes of z + relaxation
    g. Without the ridge, the next iterate is the newest z + relaxation g, less Y S^+ g. With orthonormal Q = S C it is
    Y S^+ = (Y C) Q^T. Kept are the pairs S C W and Y C W, with the leading right singular vectors W of Y C; added to the newest
    iterate they are iterates again.
    """
    slots, last = state.gram.shape[1], state.scales[:, -1:]
    kept, third = _kept(slots), min(_kept(slots), 1 + slots // 3)
    relative = last / state.scales
    # Each change in units of the scale of its iterate.
    change = state.residuals[:, :-1] - relative[:, :-1, None] * state.residuals[:, -1:]
    gain = (state.relaxed[:, :-1] - state.relaxed[:, -1:]) / state.scales[:, :-1, None]

    def products(x: jax.Array) -> jax.Array:
        return total(jnp.einsum("bin,bjn->bij", x, x), axis_name)

    size, basis, _, inverse = decomposed(products(change))
    mix = basis * inverse[:, None, :] / size[:, :, None]
    square = jnp.einsum("bji,bjk,bkl->bil", mix, products(gain), mix)
    leading = mix @ jnp.linalg.eigh(square)[1][:, :, slots - kept :]
    # As long as the newest residual: the ridge is relative to the size of what is combined.
    norms = jnp.sqrt(jnp.diagonal(state.gram, axis1=1, axis2=2))
    leading = norms[:, -1:, None] * leading

    down = jnp.all(norms[:, -1:] * relative <= norms, axis=1)
    # The newest third fills the slots with its oldest repeated: held several times, an iterate only has less of the ridge.
    recent = [max(slot, slots - third) for slot in range(slots - kept, slots)]

    def chosen(old: jax.Array, change: jax.Array) -> jax.Array:
        directions = old[:, -1:] + jnp.einsum("bij,bin->bjn", leading, change)
        return jnp.where(down[:, None, None], jnp.concatenate([directions, old[:, -1:]], axis=1), old[:, jnp.asarray(recent)])

    residuals = chosen(state.residuals, change)
    relaxed = chosen(state.relaxed, last[:, :, None] * gain)
    scales = jnp.where(down[:, None], last, state.scales[:, jnp.asarray(recent)])
    return AndersonState(
        relaxed=jax.lax.dynamic_update_slice_in_dim(state.relaxed, relaxed, 0, axis=1),
        residuals=jax.lax.dynamic_update_slice_in_dim(state.residuals, residuals, 0, axis=1),
        gram=jnp.zeros_like(state.gram).at[:, :kept, :kept].set(products(residuals)),
        scales=jax.lax.dynamic_update_slice_in_dim(state.scales, scales, 0, axis=1),
    )


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
