"""Straight-through differentiation of a fixed number of steps."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients.base import Map, flat_map, stopped
from deq_flax.equilibrium.loop import solve
from deq_flax.equilibrium.solution import Solution, Solver
from deq_flax.equilibrium.state import flattener


@dataclass(frozen=True)
class Unroll:
    """Apply f `steps` times from z0 and differentiate straight through; of the solver, only its tolerance is used.

    The value is f applied `steps` times. Memory grows with the steps, unless `remat` trades it for a second evaluation of
    each. The statistics cost one evaluation more, which the compiler drops when nobody reads them. Every mode of
    differentiation works; the probe stays zero.

    Raises:
      ValueError: steps is less than 1.
    """

    steps: int
    remat: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Unroll: steps must be at least 1, not {self.steps}")

    def __call__(
        self,
        f: Map,
        z0: Any,
        solver: Solver,
        max_steps: jax.Array | int | None = None,
        probe: jax.Array | None = None,
    ) -> Solution:
        flatten, _ = flattener(z0)
        once = jax.checkpoint(f) if self.remat else f
        sampled = solver.sample_steps

        def body(z: Any, _: None) -> tuple[Any, jax.Array | None]:
            return once(z), jax.lax.stop_gradient(flatten(z)) if sampled else None

        z, path = jax.lax.scan(body, z0, None, length=self.steps)
        flat_f, x, _ = flat_map(f, jax.lax.stop_gradient(z))
        _, stats = solve(stopped(flat_f), x, solver.quiet(max_steps=1))
        stats = replace(stats, nfe=stats.nfe + self.steps, steps=stats.steps + self.steps)
        if path is not None:
            # Steps beyond the last are padded with it, as the loop does.
            path = jnp.concatenate([path, x[None]])[jnp.minimum(jnp.asarray(sampled), self.steps)]
        return Solution(value=z, stats=replace(stats, sampled=path))
