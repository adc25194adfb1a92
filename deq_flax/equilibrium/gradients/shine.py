"""SHINE: the forward solver's inverse used for the adjoint (Ramzi et al. 2022)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients.base import Map, attach, flat_map, stopped
from deq_flax.equilibrium.loop import solve, solve_with_state
from deq_flax.equilibrium.solution import Solution, Solver
from deq_flax.equilibrium.solvers.broyden import Broyden, BroydenState, apply_inverse_transpose


@dataclass(frozen=True)
class Shine:
    """The implicit gradient with (I - J^T)^{-1} replaced by Broyden's own estimate, -H^T (Ramzi et al. 2022, section 2).

    The adjoint then costs no product with J at all. The estimate is good along the steps the solver took, which need not
    be where the gradient points; so a member whose direction H^T v is longer than `fallback` times the cotangent v takes v
    instead, which is the Jacobian-free gradient (the fallback of section 3 there), and `refine_steps` iterations of the
    adjoint equation may follow (the refinement there).

    The solver must be `Broyden`. It keeps the history of members that have stopped, which costs a pass over it every step.
    Reverse mode, vmap, scan and checkpoint work; forward mode raises JAX's error about custom_vjp. Second derivatives take z*
    and H as constants. The probe stays zero.

    Args:
      refine_steps: further iterations of the adjoint equation, by Broyden's method from that direction; the best is taken.
      fallback: the largest ratio of the norms allowed, the paper's is 1.3; None never falls back.

    Raises:
      ValueError: an option is out of range, or the solver is not `Broyden`.
    """

    refine_steps: int = 0
    fallback: float | None = 1.3

    def __post_init__(self):
        if self.refine_steps < 0:
            raise ValueError(f"Shine: refine_steps must be at least 0, not {self.refine_steps}")
        if self.fallback is not None and not self.fallback > 0:
            raise ValueError(f"Shine: fallback must be None or positive, not {self.fallback}")

    def __call__(
        self,
        f: Map,
        z0: Any,
        solver: Solver,
        max_steps: jax.Array | int | None = None,
        probe: jax.Array | None = None,
    ) -> Solution:
        if not isinstance(solver, Broyden):
            raise ValueError(f"Shine shares the inverse that Broyden builds: it needs that solver, not {type(solver).__name__}")
        flat_f, x0, unflatten = flat_map(f, z0)
        x, stats, state = jax.lax.stop_gradient(solve_with_state(stopped(flat_f), x0, solver, max_steps))
        fx, pullback = jax.vjp(flat_f, x)
        refiner = solver.quiet(max_steps=self.refine_steps + 1)

        def backward(kept: tuple[BroydenState, Any], cotangent: jax.Array) -> Any:
            state, pullback = kept
            direction = self._direction(state, cotangent)
            if self.refine_steps:
                direction, _ = solve(lambda y: pullback(y)[0] + cotangent, direction, refiner)
            return direction, None, None

        share = jax.custom_vjp(lambda fx, state, pullback: fx)
        share.defvjp(lambda fx, state, pullback: (fx, (state, pullback)), backward)
        return Solution(value=unflatten(attach(x, share(fx, state, pullback))), stats=stats)

    def _direction(self, state: BroydenState, cotangent: jax.Array) -> jax.Array:
        """(B, N): -H^T times the cotangent, or the cotangent itself where that is too long or not finite."""
        direction = -apply_inverse_transpose(state, cotangent)
        norm = jnp.sqrt(jnp.sum(direction * direction, axis=1))
        limit = jnp.inf if self.fallback is None else self.fallback * jnp.sqrt(jnp.sum(cotangent * cotangent, axis=1))
        return jnp.where((jnp.isfinite(norm) & (norm <= limit))[:, None], direction, cotangent)
