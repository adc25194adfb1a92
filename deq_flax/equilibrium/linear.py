"""Solvers of the linear equation x = J x + b, the adjoint equation among them: their protocol, and GMRES.

Every `Solver` fulfills the protocol by iterating on x -> J x + b. GMRES solves linear equations only.

The equation is homogeneous: b times c has the solution x times c. So its solvers stop by a residual that does not change with
the scale of b, which for an adjoint is the scale of the loss: ||J x + b - x|| / ||J x + b||. It is relative to x, not to b: a
residual of tol makes x the exact solution for a J changed by about tol in norm (its backward error, Rigal & Gaches 1967), and
J is no better known, since it is taken at an equilibrium that is itself solved to a tolerance. The relative error of x is at
most about ||(I - J)^{-1}|| times tol.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.loop import check_axis_name, check_options
from deq_flax.equilibrium.shards import AxisName, cast, settled, total, varying
from deq_flax.equilibrium.solution import FlatMap, SolverStats, norm, norms, power_of_two, relative_residual


@runtime_checkable
class LinearSolver(Protocol):
    """A solver of x = J x + b on flat states, for `Implicit(solver=...)`."""

    def solve_linear(self, jacobian: FlatMap, b: jax.Array) -> tuple[jax.Array, SolverStats]:
        """Return x, (B, N), with x = jacobian(x) + b, and statistics. `jacobian` is linear, each sample by itself.

        Gradients pass a b whose samples have a largest entry near 1.
        """
        ...

    def with_limits(self, *, tol: float | None = None, max_steps: int | None = None, axis_name: AxisName | None = None) -> Self:
        """Return this solver with another tolerance, limit or axes, where given, recording nothing but statistics."""
        ...


def solve_scaled(
    solver: LinearSolver, jacobian: FlatMap, b: jax.Array, axis_name: AxisName | None
) -> tuple[jax.Array, SolverStats]:
    """Solve x = jacobian(x) + b, (B, N), in units in which each sample of b is near 1.

    Norms and products of a b of 1e-30 or 1e30 would under- or overflow in float32. The scales S are powers of two: nothing is
    rounded. The equation in y = S^-1 x is y = S^-1 J S y + S^-1 b: where samples see each other, J does not commute with S.
    """
    scale = power_of_two(b, axis_name)
    x, stats = solver.solve_linear(lambda y: jacobian(scale * y) / scale, b / scale)
    return scale * x, replace(stats, absolute_residual=scale[:, 0] * stats.absolute_residual)


@dataclass(frozen=True)
class GMRES:
    """Restarted GMRES (Saad & Schultz 1986) for x = J x + b, a linear equation: `Implicit(solver=GMRES())`.

    Every iterate minimizes the residual over the Krylov space of A = I - J, for each sample. It is computed as generalized
    conjugate residuals: directions p_j with orthonormal images q_j = A p_j, so that iterate and residual are available at
    every step and a sample can stop at any. The next direction is the residual, or the last image when the residual has hardly
    fallen (Jiranek & Rozloznik 2010), without which the method breaks down on a rotation.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be; or axis_name is no name.
      ValueError: an option is out of range.
    """

    tol: float = 1e-6
    """Relative residual ||J x + b - x|| / ||J x + b|| at which a sample stops."""
    max_steps: int = 50
    """Limit on the products with J. One more product measures the reported residual."""
    restart: int = 20
    """Directions kept, after which the Krylov space is rebuilt. Memory: 2 x restart copies of x."""
    axis_name: AxisName | None = None
    """Axes of `jax.shard_map` over which x is spread, as for `Solver`; None: those of the forward solver."""

    def __post_init__(self):
        check_options(self, tol="[0, inf)", max_steps="[1, inf)", restart="[1, inf)")
        check_axis_name("GMRES", self.axis_name)

    def with_limits(self, *, tol: float | None = None, max_steps: int | None = None, axis_name: AxisName | None = None) -> Self:
        """Return this solver with another tolerance, limit or axes, where given."""
        return replace(
            self,
            tol=self.tol if tol is None else tol,
            max_steps=self.max_steps if max_steps is None else max_steps,
            axis_name=axis_name or self.axis_name,
        )

    def solve_linear(self, jacobian: FlatMap, b: jax.Array) -> tuple[jax.Array, SolverStats]:
        """Solve x = jacobian(x) + b, (B, N), from x = 0; see `LinearSolver`."""
        slots, axis = min(self.restart, self.max_steps), self.axis_name
        blank = jnp.zeros((b.shape[0], slots, b.shape[1]), b.dtype)

        def body(s: _State) -> _State:
            p, q, directions, images = _next_pair(s, jacobian, s.k % slots, axis)
            alpha = total(jnp.sum(q * s.r, axis=1, keepdims=True), axis)
            broken = jnp.sum(~(jnp.isfinite(p) & jnp.isfinite(q)), axis=1, dtype=jnp.int32)
            nonzero = jnp.sum(q != 0, axis=1, dtype=jnp.int32)
            go = s.active & (total(broken, axis) == 0) & (total(nonzero, axis) > 0)
            x = jnp.where(go[:, None], s.x + alpha * p, s.x)
            r = jnp.where(go[:, None], s.r - alpha * q, s.r)
            size, before, size_of_x = norms(lambda r, before, x: (r, before, x + r), r, s.r, x, axis_name=axis)
            direction = jnp.where((size > 0.9 * before)[:, None], q, r)
            step = jnp.where(go, (s.k + 1).astype(b.dtype), s.step)
            active = go & (relative_residual(size, size_of_x) > self.tol)
            return _State(s.k + 1, x, r, step, active, direction, p, q, directions, images)

        zero = jnp.zeros_like(b)
        start = _State(
            k=cast(jnp.zeros((), jnp.int32), varying(norm(b, axis))),
            x=zero,
            r=b,
            step=jnp.zeros(b.shape[:1], b.dtype),
            active=jnp.isfinite(norm(b, axis)) & (norm(b, axis) > 0),
            direction=b,
            p=zero,
            q=zero,
            directions=blank,
            images=blank,
        )
        end = jax.lax.while_loop(lambda s: (s.k < self.max_steps) & jnp.any(s.active), body, settled(body, start))
        fx = jacobian(end.x) + b
        absolute, size = norms(lambda fx, x: (fx - x, fx), fx, end.x, axis_name=axis)
        relative = relative_residual(absolute, size)
        return end.x, SolverStats(
            nfe=end.k.astype(b.dtype) + 1,
            steps=end.step,
            relative_residual=relative,
            absolute_residual=absolute,
            converged=(relative <= self.tol).astype(b.dtype),
        )


class _State(NamedTuple):
    k: jax.Array
    x: jax.Array
    r: jax.Array
    step: jax.Array
    active: jax.Array
    direction: jax.Array
    """(B, N): direction by which the space is extended next."""
    p: jax.Array
    q: jax.Array
    """(B, N): the last pair; it enters the buffers at the start of the next step."""
    directions: jax.Array
    images: jax.Array
    """(B, m, N): p_j and q_j."""


def _next_pair(
    s: _State, jacobian: FlatMap, slot: jax.Array, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the next direction, its image, orthogonal to those of slots before `slot` and of unit norm, and both buffers."""
    # Both writes come before the reads: XLA then updates the buffers in place instead of copying them every step.
    slots = s.images.shape[1]
    directions = jax.lax.dynamic_update_index_in_dim(s.directions, s.p, (s.k - 1) % slots, axis=1)
    images = jax.lax.dynamic_update_index_in_dim(s.images, s.q, (s.k - 1) % slots, axis=1)
    used = (jnp.arange(slots, dtype=jnp.int32) < slot)[None]
    p, image = s.direction, s.direction - jacobian(s.direction)
    q = image
    with jax.default_matmul_precision("highest"):
        for _ in range(2):  # twice is enough for orthogonality to working precision
            h = jnp.where(used, total(jnp.einsum("bmn,bn->bm", images, q), axis_name), 0.0)
            p = p - jnp.einsum("bm,bmn->bn", h, directions)
            q = q - jnp.einsum("bm,bmn->bn", h, images)
    size, whole = norms(lambda q, image: (q, image), q, image, axis_name=axis_name)
    # An image inside the space already searched leaves only rounding errors: no direction.
    scale = jnp.where(size > 10 * jnp.finfo(q.dtype).eps * whole, 1.0 / size, 0.0)[:, None]
    return scale * p, scale * q, directions, images
