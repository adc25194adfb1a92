"""How a fixed point is differentiated. A gradient is an object with one method, `__call__(f, z0, solver, max_steps, probe)`.

It returns a `Solution` whose value is differentiable as it says; the statistics carry no gradient. f is a function of the
state alone: what it closes over, parameters, inputs, traced values of any kind, is what gets differentiated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.loop import solve
from deq_flax.equilibrium.solution import Solution, Solver, SolverStats
from deq_flax.equilibrium.state import flattener

Map = Callable[[Any], Any]


class Gradient(Protocol):
    """See the module's head."""

    def __call__(
        self, f: Map, z0: Any, solver: Solver, max_steps: jax.Array | None = None, probe: jax.Array | None = None
    ) -> Solution: ...


def backward_probe() -> jax.Array:
    """Zeros (3,) to hand to `fixed_point(..., probe=)`: the gradient with respect to them is the adjoint solve's report.

    [evaluations of the vector-Jacobian product, largest relative residual of a member, number of adjoint solves]: sums over
    all solves that shared the probe, so that averages come out right under vmap, scan and gradient accumulation.
    """
    return jnp.zeros(3)


@dataclass(frozen=True)
class Implicit:
    """The exact gradient by the implicit function theorem (Bai et al. 2019, theorem 1).

    dz* = (I - J)^{-1} (df/dtheta) dtheta at the fixed point, with one linear solve by the same kind of iteration: for the
    adjoint, x = J^T x + grad. Memory does not depend on the number of steps. Reverse and forward mode, both nested, vmap and
    scan all work. z0 gets a zero gradient.

    Args:
      solver: for the linear solve; None: as the forward solver.
      tol: overrides that solver's tolerance. The error of the gradient is about this plus the forward one's.
      max_steps: overrides that solver's limit.
    """

    solver: Solver | None = None
    tol: float | None = None
    max_steps: int | None = None

    def __call__(
        self, f: Map, z0: Any, solver: Solver, max_steps: jax.Array | None = None, probe: jax.Array | None = None
    ) -> Solution:
        linear_solver = self._linear_solver(solver)
        flatten, unflatten = flattener(z0)

        def flat_f(x: jax.Array) -> jax.Array:
            return flatten(f(unflatten(x)))

        # The unknown is (flat state, probe). Flat, because custom_linear_solve can be transposed only if every leaf of its
        # right-hand side depends on what is differentiated; a state's leaves need not, but their concatenation does.
        def residual(unknown: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
            x, p = unknown
            return flat_f(x) - x, None if probe is None else probe - p

        def find(_, unknown: tuple[jax.Array, jax.Array | None]) -> Any:
            x, stats = solve(flat_f, unknown[0], solver, max_steps)
            return (x, probe), stats

        def linear(matvec: Callable[[Any], Any], b: tuple[jax.Array, jax.Array | None]) -> Any:
            # matvec(x, p) = ((J - I) x, -p): two equations that do not meet. The second one's adjoint answers with a report.
            def adjoint_or_tangent(matvec: Callable[[Any], Any], b: Any) -> tuple[jax.Array, SolverStats]:
                p = None if probe is None else jnp.zeros_like(probe)
                return solve(lambda x: x + matvec((x, p))[0] - b[0], -b[0], linear_solver)

            def forward(matvec: Callable[[Any], Any], b: Any) -> Any:
                return adjoint_or_tangent(matvec, b)[0], None if probe is None else -b[1]

            def transposed(matvec: Callable[[Any], Any], b: Any) -> Any:
                x, stats = adjoint_or_tangent(matvec, b)
                return x, None if probe is None else _report(stats, probe.dtype)

            return jax.lax.custom_linear_solve(matvec, _tie(*b), forward, transposed)

        (x, _), stats = jax.lax.custom_root(residual, (flatten(z0), probe), find, linear, has_aux=True)
        return Solution(value=unflatten(x), stats=jax.lax.stop_gradient(stats))

    def _linear_solver(self, forward: Solver) -> Solver:
        options: dict[str, Any] = {"trace": False}
        if self.tol is not None:
            options["tol"] = self.tol
        if self.max_steps is not None:
            options["max_steps"] = self.max_steps
        return replace(self.solver or forward, **options)  # ty: ignore[invalid-argument-type]


@dataclass(frozen=True)
class Unroll:
    """Apply f `steps` times from z0 and differentiate straight through; the solver is not used.

    The value is f applied `steps` times. Memory grows with the steps, unless `remat` trades it for a second evaluation of
    each. The statistics cost one evaluation more, which the compiler drops when nobody reads them.

    Raises:
      ValueError: steps is less than 1.
    """

    steps: int
    remat: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"Unroll: steps must be at least 1, not {self.steps}")

    def __call__(
        self, f: Map, z0: Any, solver: Solver, max_steps: jax.Array | None = None, probe: jax.Array | None = None
    ) -> Solution:
        flatten, _ = flattener(z0)
        once = jax.checkpoint(f) if self.remat else f
        z, _ = jax.lax.scan(lambda z, _: (once(z), None), z0, None, length=self.steps)
        return Solution(value=z, stats=_stats_at(f, jax.lax.stop_gradient(z), self.steps, solver, flatten))


def _stats_at(f: Map, z: Any, steps: int, solver: Solver, flatten: Callable[[Any], jax.Array]) -> SolverStats:
    """Statistics of an iterate that some other means than the loop produced, with one evaluation more."""
    at = flatten(z)
    _, stats = solve(lambda x: jax.lax.stop_gradient(flatten(f(z))), at, replace(solver, max_steps=1, trace=False))  # ty: ignore[invalid-argument-type]
    return replace(stats, nfe=stats.nfe + steps, steps=stats.steps + steps)


def _tie(b: jax.Array, p: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """(b, p), each depending on the other by nothing, so that neither is a constant when only the other is differentiated."""
    if p is None:
        return b, None
    return b + 0.0 * p[0].astype(b.dtype), p + 0.0 * b[:1, 0].astype(p.dtype)


def _report(stats: SolverStats, dtype: Any) -> jax.Array:
    return jnp.stack([stats.nfe, jnp.max(stats.relative_residual), jnp.ones_like(stats.nfe)]).astype(dtype)
