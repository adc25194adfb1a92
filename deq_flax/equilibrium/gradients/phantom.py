"""Phantom gradients (Geng et al. 2021)."""

from dataclasses import dataclass
from typing import Any, Literal

import jax

from deq_flax.equilibrium.gradients.base import Map, attach, flat_map, stopped, truncated_series
from deq_flax.equilibrium.loop import solve
from deq_flax.equilibrium.solution import Solution, Solver

FORMS = ("unrolled", "neumann")


@dataclass(frozen=True)
class PhantomGradient:
    """The gradient of `steps` damped steps from z*, held constant (Geng et al. 2021, section 3.2, lambda = damping).

    'unrolled': z <- (1 - damping) z + damping f(z), differentiated straight through; the Jacobian is taken at every step.
    'neumann': (I - J)^{-1} replaced by damping sum_{i<steps} (damping J + (1 - damping) I)^i, with J at z* alone.
    The two agree where z* is an exact fixed point. The value is the solver's z* in both, so that statistics and evaluation
    are about the same point; the paper's unrolled form goes on from the last step instead, which differs by the residual.

    Reverse and forward mode, vmap and scan work. Unrolling keeps `steps` evaluations of f in memory, which the 'neumann'
    form does not. The probe stays zero: nothing is solved.

    Args:
      steps: how many.
      damping: the weight of f, in (0, 1]: 1 is plain iteration, less keeps a gradient bounded where J is large.
      form: 'unrolled' or 'neumann'.

    Raises:
      ValueError: an option is out of range.
    """

    steps: int = 5
    damping: float = 0.5
    form: Literal["unrolled", "neumann"] = "unrolled"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"PhantomGradient: steps must be at least 1, not {self.steps}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"PhantomGradient: damping must be in (0, 1], not {self.damping}")
        if self.form not in FORMS:
            raise ValueError(f"PhantomGradient: unknown form {self.form!r}; known: {', '.join(FORMS)}")

    def __call__(
        self,
        f: Map,
        z0: Any,
        solver: Solver,
        max_steps: jax.Array | int | None = None,
        probe: jax.Array | None = None,
    ) -> Solution:
        if self.form == "neumann":
            return truncated_series(f, z0, solver, max_steps, terms=self.steps, damping=self.damping)
        flat_f, x0, unflatten = flat_map(f, z0)
        x, stats = jax.lax.stop_gradient(solve(stopped(flat_f), x0, solver, max_steps))

        def damped(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return (1.0 - self.damping) * x + self.damping * flat_f(x), None

        unrolled, _ = jax.lax.scan(damped, x, None, length=self.steps)
        return Solution(value=unflatten(attach(x, unrolled)), stats=stats)
