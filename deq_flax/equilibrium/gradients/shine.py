"""SHINE: the forward solver's inverse Jacobian estimate used for the adjoint (Ramzi et al. 2022)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients.base import attach, stopped, underivable
from deq_flax.equilibrium.loop import Solver, check_options, solve, solve_with_state
from deq_flax.equilibrium.shards import AxisName
from deq_flax.equilibrium.solution import FlatMap, SolverStats, norm, power_of_two
from deq_flax.equilibrium.solvers.broyden import Broyden, BroydenState, apply_inverse_transpose

NO_SECOND = "SHINE(refine_steps=...) has no second derivatives: use refine_steps=0, or Implicit()"


@dataclass(frozen=True)
class SHINE:
    """The implicit gradient with (I - J^T)^{-1} replaced by Broyden's own estimate, -H^T (Ramzi et al. 2022, section 2).

    The adjoint then takes no product with J at all. The estimate is good along the steps of the solver, which need not include
    the direction of the cotangent v. So a sample for which H^T v is longer than `fallback` times v takes v instead, which is
    the Jacobian-free gradient (the fallback of section 3 there), and `refine_steps` iterations of the adjoint equation may
    follow (the refinement there).

    The forward solver must be `Broyden`. It keeps the history of samples that have stopped, which costs a pass over it every
    step. Reverse mode, vmap, scan and checkpoint work; forward mode raises JAX's error about custom_vjp. Second derivatives, by
    reverse over reverse mode such as `jax.jacrev(jax.jacrev(loss))`, take z* and H as constants; with `refine_steps`, whose
    iterations cannot be, they raise NotImplementedError.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be.
      ValueError: an option is out of range, or the solver is not `Broyden`.
    """

    refine_steps: int = 0
    """Further iterations of the adjoint equation, by Broyden's method from the shared direction; the best iterate is taken."""
    fallback: float | None = 1.3
    """Largest length of the shared direction relative to the cotangent, beyond which the latter is taken; None is no limit."""

    def __post_init__(self):
        check_options(self, refine_steps="[0, inf)", fallback="(0, inf]")

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        if not isinstance(solver, Broyden):
            raise ValueError(f"SHINE shares the inverse that Broyden builds: it needs that solver, not {type(solver).__name__}")
        x, stats, state = jax.lax.stop_gradient(solve_with_state(stopped(f), x0, solver, max_steps))
        fx, pullback = jax.vjp(f, x)
        refiner = solver.for_linear().with_limits(max_steps=self.refine_steps + 1)

        def backward(kept: tuple[BroydenState, Any], cotangent: jax.Array) -> Any:
            state, pullback = kept
            scale = power_of_two(cotangent, solver.axis_name)
            unit = cotangent / scale
            direction = self._direction(state, unit, solver.axis_name)
            if self.refine_steps:
                direction, _ = solve(lambda y: pullback(scale * y)[0] / scale + unit, direction, refiner)
                direction = underivable(direction, NO_SECOND)
            return scale * direction, None, None

        share = jax.custom_vjp(lambda fx, state, pullback: fx)
        # `share` again, not the bare fx: a further level of differentiation looks at what this returns.
        share.defvjp(lambda fx, state, pullback: (share(fx, state, pullback), (state, pullback)), backward)
        return attach(x, share(fx, state, pullback)), stats

    def _direction(self, state: BroydenState, cotangent: jax.Array, axis_name: AxisName | None) -> jax.Array:
        """Return -H^T times the cotangent, (B, N), or the cotangent itself where that is too long or not finite."""
        direction = -apply_inverse_transpose(state, cotangent, axis_name)
        length = norm(direction, axis_name)
        limit = jnp.inf if self.fallback is None else self.fallback * norm(cotangent, axis_name)
        return jnp.where((jnp.isfinite(length) & (length <= limit))[:, None], direction, cotangent)
