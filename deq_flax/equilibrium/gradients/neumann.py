"""Truncated Neumann series of the implicit gradient, and its one-term form."""

from dataclasses import dataclass

import jax

from deq_flax.equilibrium.loop import Solver, check_options, solve
from deq_flax.equilibrium.solution import FlatMap, SolverStats


@dataclass(frozen=True)
class Neumann:
    """The implicit gradient with (I - J)^{-1} replaced by r sum_{i<terms} (r J + (1 - r) I)^i at z*, r = relaxation.

    With r = 1 it is the Neumann series I + J + ... + J^{terms - 1} (Lorraine et al. 2020, eq. 5), with r < 1 the Neumann form
    of the phantom gradient (Geng et al. 2021, section 3.2, lambda = r). The error of the adjoint is (r J^T + (1 - r) I)^terms
    times the exact one: it shrinks with the spectral radius of that matrix, and the series diverges where that is above 1.

    In forward mode the series is applied to (df/dtheta) dtheta, in reverse mode its transpose to the cotangent. Both modes,
    nested too, vmap and scan work; a second derivative is the series of the series.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be.
      ValueError: an option is out of range.
    """

    terms: int = 3
    """Terms of the series; the gradient takes as many vector-Jacobian products."""
    relaxation: float = 1.0
    """Weight r of the Jacobian in a term, in (0, 1]; 1 is the plain series, less keeps it bounded for a large Jacobian."""

    def __post_init__(self):
        check_options(self, terms="[1, inf)", relaxation="(0, 1]")

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        def tangent(minus: FlatMap, b: jax.Array) -> jax.Array:
            # minus(x) = (J - I) x; wanted: x with minus(x) = b. Horner's scheme: x <- first + (r J + (1 - r) I) x.
            first = -self.relaxation * b
            return jax.lax.fori_loop(1, self.terms, lambda _, x: first + x + self.relaxation * minus(x), first)

        return jax.lax.custom_root(lambda x: f(x) - x, x0, lambda _, x: solve(f, x, solver, max_steps), tangent, has_aux=True)


@dataclass(frozen=True)
class JacobianFree:
    """The gradient of one evaluation of f at z* held constant (Fung et al. 2022, eq. 9): `Neumann(terms=1)`.

    A descent direction where f is contractive enough (theorem 3.1 there).
    """

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        return Neumann(terms=1)(f, x0, solver, max_steps, probe)
