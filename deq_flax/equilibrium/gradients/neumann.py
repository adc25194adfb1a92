"""Truncated Neumann series of the implicit gradient."""

from dataclasses import dataclass
from typing import Any

import jax

from deq_flax.equilibrium.gradients.base import Map, truncated_series
from deq_flax.equilibrium.solution import Solution, Solver


@dataclass(frozen=True)
class Neumann:
    """The implicit gradient with (I - J)^{-1} replaced by I + J + ... + J^{terms - 1} at z* (Lorraine et al. 2020, eq. 5).

    The error of the adjoint is (J^T)^terms times the exact one: it shrinks with the spectral radius of J, and the series is
    of no use where that is above 1. The value is the solver's. Reverse and forward mode, nested too, vmap and scan work; a
    second derivative is the series of the series. The probe stays zero: nothing is solved.

    Raises:
      ValueError: terms is less than 1.
    """

    terms: int = 3

    def __post_init__(self):
        if self.terms < 1:
            raise ValueError(f"Neumann: terms must be at least 1, not {self.terms}")

    def __call__(
        self,
        f: Map,
        z0: Any,
        solver: Solver,
        max_steps: jax.Array | int | None = None,
        probe: jax.Array | None = None,
    ) -> Solution:
        return truncated_series(f, z0, solver, max_steps, terms=self.terms, damping=1.0)


@dataclass(frozen=True)
class JacobianFree:
    """One term of the series: the gradient of one evaluation of f at z* held constant (Fung et al. 2022, eq. 9).

    A descent direction where f is contractive enough (theorem 3.1 there). Otherwise as `Neumann(terms=1)`.
    """

    def __call__(
        self,
        f: Map,
        z0: Any,
        solver: Solver,
        max_steps: jax.Array | int | None = None,
        probe: jax.Array | None = None,
    ) -> Solution:
        return truncated_series(f, z0, solver, max_steps, terms=1, damping=1.0)
