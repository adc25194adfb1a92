"""Phantom gradients (Geng et al. 2021)."""

from dataclasses import dataclass

import jax

from deq_flax.equilibrium.gradients.base import attach, stopped
from deq_flax.equilibrium.loop import Solver, check_options, solve
from deq_flax.equilibrium.solution import FlatMap, SolverStats


@dataclass(frozen=True)
class PhantomGradient:
    """The gradient of `steps` relaxed steps from z*, held constant (Geng et al. 2021, section 3.2, unrolled form).

    The steps z <- (1 - relaxation) z + relaxation f(z) are differentiated straight through, the Jacobian taken at every step;
    `Neumann` takes it at z* alone. The two agree where z* is an exact fixed point. The value is the solver's z*, so that
    statistics and evaluation refer to the same point; the paper's is that of the last step, which differs by the residual.

    Reverse and forward mode, vmap and scan work.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be.
      ValueError: an option is out of range.
    """

    steps: int = 5
    """Relaxed steps that are differentiated; as many evaluations of f are kept in memory."""
    relaxation: float = 0.5
    """Weight of f(z) in a step, in (0, 1]; 1 is plain iteration, less keeps the gradient bounded for a large Jacobian."""

    def __post_init__(self):
        check_options(self, steps="[1, inf)", relaxation="(0, 1]")

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        x, stats = jax.lax.stop_gradient(solve(stopped(f), x0, solver, max_steps))

        def relaxed(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return (1.0 - self.relaxation) * x + self.relaxation * f(x), None

        unrolled, _ = jax.lax.scan(relaxed, x, None, length=self.steps)
        return attach(x, unrolled), stats
