"""The implicit function theorem."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients.base import Flat, Map, flat_map
from deq_flax.equilibrium.loop import solve
from deq_flax.equilibrium.solution import Solution, Solver, SolverStats
from deq_flax.equilibrium.solvers.gmres import GMRES


@dataclass(frozen=True)
class Implicit:
    """The exact gradient by the implicit function theorem (Bai et al. 2019, theorem 1).

    dz* = (I - J)^{-1} (df/dtheta) dtheta at the fixed point, with one linear solve by the same kind of iteration: for the
    adjoint, x = J^T x + grad. Memory does not depend on the number of steps. Reverse and forward mode, both nested, vmap and
    scan all work. z0 gets a zero gradient.

    Args:
      solver: for the linear solve; None: as the forward solver. Besides the solvers of `fixed_point`, `GMRES`; `Picard` sums
        the Neumann series until it converges.
      tol: overrides that solver's tolerance. The error of the gradient is about this plus the forward one's.
      max_steps: overrides that solver's limit.
    """

    solver: Solver | GMRES | None = None
    tol: float | None = None
    max_steps: int | None = None

    def __call__(
        self,
        f: Map,
        z0: Any,
        solver: Solver,
        max_steps: jax.Array | int | None = None,
        probe: jax.Array | None = None,
    ) -> Solution:
        linear_solver = self._linear_solver(solver)
        flat_f, x0, unflatten = flat_map(f, z0)

        # The unknown is (flat state, probe). Flat, because custom_linear_solve can be transposed only if every leaf of its
        # right-hand side depends on what is differentiated; a state's leaves need not, but their concatenation does.
        def residual(unknown: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
            x, p = unknown
            return flat_f(x) - x, None if probe is None or p is None else probe - p

        def find(_, unknown: tuple[jax.Array, jax.Array | None]) -> Any:
            x, stats = solve(flat_f, unknown[0], solver, max_steps)
            return (x, probe), stats

        def linear(matvec: Callable[[Any], Any], b: tuple[jax.Array, jax.Array | None]) -> Any:
            # matvec(x, p) = ((J - I) x, -p): two equations that do not meet. The second one's adjoint answers with a report.
            def adjoint_or_tangent(matvec: Callable[[Any], Any], b: Any) -> tuple[jax.Array, SolverStats]:
                p = None if probe is None else jnp.zeros_like(probe)
                return solve_linear(lambda x: x + matvec((x, p))[0], -b[0], linear_solver)

            def forward(matvec: Callable[[Any], Any], b: Any) -> Any:
                return adjoint_or_tangent(matvec, b)[0], None if probe is None else -b[1]

            def transposed(matvec: Callable[[Any], Any], b: Any) -> Any:
                x, stats = adjoint_or_tangent(matvec, b)
                return x, None if probe is None else _report(stats, probe.dtype)

            return jax.lax.custom_linear_solve(matvec, _tie(*b), forward, transposed)

        (x, _), stats = jax.lax.custom_root(residual, (x0, probe), find, linear, has_aux=True)
        return Solution(value=unflatten(x), stats=jax.lax.stop_gradient(stats))

    def _linear_solver(self, forward: Solver) -> Solver | GMRES:
        solver = self.solver or forward
        given = {"tol": self.tol, "max_steps": self.max_steps}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return solver.quiet(**options) if isinstance(solver, Solver) else replace(solver, **options)


def solve_linear(jacobian: Flat, b: jax.Array, solver: Solver | GMRES) -> tuple[jax.Array, SolverStats]:
    """x = jacobian(x) + b, for a linear `jacobian` of flat states (B, N), by a solver of either kind."""
    if isinstance(solver, GMRES):
        return solver.solve_linear(jacobian, b)
    return solve(lambda x: jacobian(x) + b, b, solver)


def _tie(b: jax.Array, p: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """(b, p), each depending on the other by nothing, so that neither is a constant when only the other is differentiated."""
    if p is None:
        return b, None
    return b + 0.0 * p[0].astype(b.dtype), p + 0.0 * b[:1, 0].astype(p.dtype)


def _report(stats: SolverStats, dtype: Any) -> jax.Array:
    return jnp.stack([stats.nfe, jnp.max(stats.relative_residual), jnp.ones_like(stats.nfe)]).astype(dtype)
