"""Picard iteration, plain or relaxed."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.loop import Solver, check_options
from deq_flax.equilibrium.shards import total
from deq_flax.equilibrium.solution import scale_of


class AdaptiveState(NamedTuple):
    """The last step of an adaptive iteration."""

    residual: jax.Array
    """(B, N): g = f(z) - z where it started, in units of `scale`."""
    scale: jax.Array
    """(B, 1): a power of two near the norm of that g."""
    relaxation: jax.Array
    """(B,): its weight of f(z)."""


@dataclass(frozen=True)
class Picard(Solver):
    """z <- z + relaxation (f(z) - z). Converges linearly, at the spectral radius of (1 - relaxation) I + relaxation J.

    On the linear adjoint equation this is the Neumann series, summed until it converges. With `adaptive` each sample takes the
    relaxation that would have made the residual of the last step smallest (Barzilai & Borwein 1988, eq. 6), between 0.05 and 5:
    of 400 problems of 32 elements (benchmarks/battery.py), 100 evaluations solve 307, and 217 without.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be.
      ValueError: an option is out of range.
    """

    relaxation: float = 1.0
    """Weight of f(z) in a step, in (0, 1]; 1 is plain iteration, less helps with negative or complex eigenvalues."""
    adaptive: bool = False
    """Choose the relaxation in every step, for each sample; `relaxation` is that of the first. Memory: one more copy of z."""

    def __post_init__(self):
        super().__post_init__()
        check_options(self, relaxation="(0, 1]")

    def init(self, z: jax.Array) -> AdaptiveState | None:
        if not self.adaptive:
            return None
        batch = z.shape[:1]
        return AdaptiveState(jnp.zeros_like(z), jnp.ones((*batch, 1), z.dtype), jnp.full(batch, self.relaxation, z.dtype))

    def step(
        self, k: jax.Array, z: jax.Array, g: jax.Array, state: AdaptiveState | None
    ) -> tuple[jax.Array, AdaptiveState | None]:
        if state is None:
            return z + self.relaxation * g, None
        fall = state.residual - g / state.scale
        along = total(jnp.sum(state.residual * fall, axis=1), self.axis_name)
        square = total(jnp.sum(fall * fall, axis=1), self.axis_name)
        known = (k > 0) & (square > 0)
        best = jnp.clip(state.relaxation * along / jnp.where(known, square, 1.0), 0.05, 5.0)
        relaxation = jnp.where(known, best, state.relaxation)
        scale = scale_of(g, self.axis_name)
        return z + relaxation[:, None] * g, AdaptiveState(g / scale, scale, relaxation)
