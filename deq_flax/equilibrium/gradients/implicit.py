"""The implicit gradient, by the implicit function theorem."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.linear import LinearSolver, solve_scaled
from deq_flax.equilibrium.loop import Solver, check_options, solve
from deq_flax.equilibrium.shards import cast, varying
from deq_flax.equilibrium.solution import FlatMap, SolverStats


@dataclass(frozen=True)
class Implicit:
    """The exact gradient by the implicit function theorem (Bai et al. 2019, theorem 1).

    dz* = (I - J)^{-1} (df/dtheta) dtheta at the fixed point, with one linear solve; in reverse mode this is the adjoint
    equation x = J^T x + grad. Memory does not depend on the number of steps. Reverse and forward mode, both nested, vmap and
    scan all work.

    The adjoint equation is linear, so its solve stops by the relative residual, whatever stops the forward one, and the
    accuracy of the gradient does not depend on the scale of the loss.

    Raises:
      TypeError: solver solves no linear equations, or tol is not a number of Python, or max_steps not a whole one.
      ValueError: solver stops by the absolute residual, or tol or max_steps is out of range.
    """

    solver: LinearSolver | None = None
    """Solver of the adjoint equation: any `Solver`, or `GMRES`; None takes the forward one. `Picard` sums a Neumann series."""
    tol: float | None = None
    """Relative tolerance of the adjoint solve; None takes that of its solver, or 1e-6 if it is the forward one and absolute.
    The error of the gradient is about this plus the forward one."""
    max_steps: int | None = None
    """Limit on vector-Jacobian products of the adjoint solve; None takes that of its solver."""

    def __post_init__(self):
        if self.solver is not None and (isinstance(self.solver, type) or not isinstance(self.solver, LinearSolver)):
            raise TypeError(f"Implicit: solver must be None, a Solver such as Broyden(), or GMRES(), not {self.solver!r}")
        check_options(self, tol="[0, inf)", max_steps="[1, inf)")
        if isinstance(self.solver, Solver) and self.solver.stop == "absolute":
            raise ValueError(
                "Implicit: the adjoint equation is solved to a relative residual: set stop='relative' in its solver"
            )

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        limits = {"tol": self.tol, "max_steps": self.max_steps, "axis_name": solver.axis_name}
        linear_solver = (self.solver or solver.for_linear()).with_limits(**limits)
        probe = cast(probe, varying(x0))  # reports of several shards are added

        # The unknown is (x, probe). x is one flat array, because custom_linear_solve can be transposed only if every leaf of
        # its right-hand side depends on what is differentiated; a state's leaves need not, but their concatenation does.
        def residual(unknown: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
            x, p = unknown
            return f(x) - x, None if probe is None or p is None else probe - p

        def find(_, unknown: tuple[jax.Array, jax.Array | None]) -> Any:
            x, stats = solve(f, unknown[0], solver, max_steps)
            return (x, probe), stats

        def linear(matvec: Callable[[Any], Any], b: tuple[jax.Array, jax.Array | None]) -> Any:
            matvec = _linearized(matvec)

            # matvec(x, p) = ((J - I) x, -p): two independent equations. The adjoint of the second returns the report.
            def adjoint_or_tangent(matvec: Callable[[Any], Any], b: Any) -> tuple[jax.Array, SolverStats]:
                p = None if probe is None else jnp.zeros_like(probe)
                # In a shard_map JAX gives all constants of matvec one type, and checks types again but in loops and under jit.
                jacobian = jax.jit(lambda x: x + matvec((x, p))[0])
                return solve_scaled(linear_solver, jacobian, -b[0], solver.axis_name)

            def forward(matvec: Callable[[Any], Any], b: Any) -> Any:
                return adjoint_or_tangent(matvec, b)[0], None if probe is None else -b[1]

            def transposed(matvec: Callable[[Any], Any], b: Any) -> Any:
                x, stats = adjoint_or_tangent(matvec, b)
                return x, None if probe is None else _report(stats, probe.dtype)

            return jax.lax.custom_linear_solve(matvec, _tie(*b), forward, transposed)

        (x, _), stats = jax.lax.custom_root(residual, (x0, probe), find, linear, has_aux=True)
        return x, stats


def backward_probe() -> jax.Array:
    """Return zeros (3,) for `fixed_point(..., probe=)`: the gradient with respect to them reports on the adjoint solve.

    [vector-Jacobian products, largest relative residual in the batch, number of adjoint solves]: sums over all solves that
    shared the probe, so that averages are right under vmap, scan and gradient accumulation. Only `Implicit` solves an
    adjoint equation; other gradients leave zeros.
    """
    return jnp.zeros(3)


def _linearized(matvec: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the linear map that custom_root hands over such that it does not evaluate f.

    With jax 0.10 it is linearized at the root already. That of jax 0.12 is a partial application of (constants of f, root),
    and evaluates f at the root anew for every product: on TPU an adjoint iteration then takes twice as long.
    """
    f: Any = getattr(getattr(matvec, "func", None), "f", None)
    if f is None or not isinstance(matvec, partial) or len(matvec.args) != 2:
        return matvec
    constants, root = matvec.args
    return jax.linearize(partial(f, constants), root)[1]


def _report(stats: SolverStats, dtype: Any) -> jax.Array:
    return jnp.stack([stats.nfe, jnp.max(stats.relative_residual, initial=0.0), jnp.ones_like(stats.nfe)]).astype(dtype)


def _tie(b: jax.Array, p: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Add nothing of each of (b, p) to the other, so that neither is a constant when only one of them is differentiated.

    A choice that is never taken, not a product with zero, which would hand on a NaN of one sample to the others.
    """
    if p is None:
        return b, None
    nothing = lambda x: jnp.sum(jnp.where(False, x, jnp.zeros_like(x)))  # noqa: E731
    return b + nothing(p).astype(b.dtype), p + nothing(b).astype(p.dtype)
