"""The gradient of a fixed number of unrolled steps."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients.base import stopped
from deq_flax.equilibrium.loop import Solver, solve
from deq_flax.equilibrium.solution import FlatMap, SolverStats


@dataclass(frozen=True)
class Unroll:
    """The gradient of f applied `steps` times from z0, differentiated straight through.

    The value is f applied `steps` times; of the solver, tolerance, stop mode and trajectory steps are used. The statistics take
    one more evaluation, which the compiler drops when they are not read. Every mode of differentiation works.

    Raises:
      ValueError: steps is less than 1.
    """

    steps: int
    """Evaluations of f."""
    remat: bool = False
    """Keep the states alone and evaluate f again in the gradient (rematerialization); else memory holds every evaluation."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Unroll: steps must be at least 1, not {self.steps}")

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        once = jax.checkpoint(f) if self.remat else f
        wanted = solver.trajectory_steps

        def body(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array | None]:
            return once(x), jax.lax.stop_gradient(x) if wanted else None

        x, path = jax.lax.scan(body, x0, None, length=self.steps)
        last = jax.lax.stop_gradient(x)
        _, stats = solve(stopped(f), last, solver.with_limits(max_steps=1))
        if path is not None:
            # Steps beyond the last are padded with it, as the loop does.
            path = jnp.concatenate([path, last[None]])[jnp.minimum(jnp.asarray(wanted), self.steps)]
        return x, replace(stats, nfe=stats.nfe + self.steps, steps=stats.steps + self.steps, trajectory=path)
