"""GMRES, for the adjoint equation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.solution import SolverStats


class _State(NamedTuple):
    k: jax.Array
    x: jax.Array
    r: jax.Array
    step: jax.Array
    active: jax.Array
    direction: jax.Array
    """(B, N): which way the space is extended next."""
    p: jax.Array
    q: jax.Array
    """(B, N): the last pair; it enters the buffers at the start of the next step."""
    directions: jax.Array
    images: jax.Array
    """(B, m, N): p_j and q_j."""


@dataclass(frozen=True)
class GMRES:
    """Restarted GMRES (Saad & Schultz 1986) for x = J x + b, a linear equation: `Implicit(solver=GMRES())`.

    Every iterate minimises the residual over the Krylov space of A = I - J, member by member. It is computed as generalised
    conjugate residuals: directions p_j with orthonormal images q_j = A p_j, so that iterate and residual are at hand in every
    step and a member can stop in any. The next direction is the residual, or the last image when the residual has hardly
    fallen (Jiranek & Rozloznik 2010), without which a rotation breaks the method down.

    Args:
      tol: a member stops when ||J x + b - x|| is at most tol ||J x + b||.
      max_steps: limit on the products with J; one more measures the residual that is reported.
      restart: directions kept; the state is 2 x restart copies of x. After so many the space is begun anew.

    Raises:
      ValueError: an option is out of range.
    """

    tol: float = 1e-6
    max_steps: int = 50
    restart: int = 20

    def __post_init__(self):
        if not self.tol >= 0:
            raise ValueError(f"GMRES: tol must be at least 0, not {self.tol}")
        if self.max_steps < 1:
            raise ValueError(f"GMRES: max_steps must be at least 1, not {self.max_steps}")
        if self.restart < 1:
            raise ValueError(f"GMRES: restart must be at least 1, not {self.restart}")

    def solve_linear(self, jacobian: Callable[[jax.Array], jax.Array], b: jax.Array) -> tuple[jax.Array, SolverStats]:
        """Solve x = jacobian(x) + b from x = 0. `jacobian`: (B, N) -> (B, N), linear, member by member; b: (B, N)."""
        slots = min(self.restart, self.max_steps)
        blank = jnp.zeros((b.shape[0], slots, b.shape[1]), b.dtype)

        def body(s: _State) -> _State:
            p, q, directions, images = _next_pair(s, jacobian, s.k % slots)
            alpha = jnp.sum(q * s.r, axis=1, keepdims=True)
            go = s.active & jnp.all(jnp.isfinite(p) & jnp.isfinite(q), axis=1) & jnp.any(q != 0, axis=1)
            x = jnp.where(go[:, None], s.x + alpha * p, s.x)
            r = jnp.where(go[:, None], s.r - alpha * q, s.r)
            direction = jnp.where((_norm(r) > 0.9 * _norm(s.r))[:, None], q, r)
            step = jnp.where(go, (s.k + 1).astype(b.dtype), s.step)
            active = go & (_relative(r, x + r) > self.tol)
            return _State(s.k + 1, x, r, step, active, direction, p, q, directions, images)

        zero = jnp.zeros_like(b)
        start = _State(
            k=jnp.zeros((), jnp.int32),
            x=zero,
            r=b,
            step=jnp.zeros(b.shape[:1], b.dtype),
            active=jnp.isfinite(_norm(b)) & (_norm(b) > 0),
            direction=b,
            p=zero,
            q=zero,
            directions=blank,
            images=blank,
        )
        end = jax.lax.while_loop(lambda s: (s.k < self.max_steps) & jnp.any(s.active), body, start)
        fx = jacobian(end.x) + b
        relative = _relative(fx - end.x, fx)
        return end.x, SolverStats(
            nfe=end.k.astype(b.dtype) + 1,
            steps=end.step,
            relative_residual=relative,
            absolute_residual=_norm(fx - end.x),
            converged=(relative <= self.tol).astype(b.dtype),
        )


def _next_pair(
    s: _State, jacobian: Callable[[jax.Array], jax.Array], slot: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The next direction and its image, orthogonalised against those of slots before `slot` and scaled; and the buffers."""
    # Both writes come before the reads: XLA then updates the buffers in place instead of copying them every step.
    slots = s.images.shape[1]
    directions = jax.lax.dynamic_update_index_in_dim(s.directions, s.p, (s.k - 1) % slots, axis=1)
    images = jax.lax.dynamic_update_index_in_dim(s.images, s.q, (s.k - 1) % slots, axis=1)
    used = (jnp.arange(slots) < slot)[None]
    p, image = s.direction, s.direction - jacobian(s.direction)
    q = image
    for _ in range(2):  # twice is enough for orthogonality to working precision
        h = jnp.where(used, jnp.einsum("bmn,bn->bm", images, q), 0.0)
        p = p - jnp.einsum("bm,bmn->bn", h, directions)
        q = q - jnp.einsum("bm,bmn->bn", h, images)
    size = _norm(q)
    # What is left of an image inside the space already searched is rounding: no direction.
    scale = jnp.where(size > 10 * jnp.finfo(q.dtype).eps * _norm(image), 1.0 / size, 0.0)[:, None]
    return scale * p, scale * q, directions, images


def _relative(r: jax.Array, fx: jax.Array) -> jax.Array:
    size = _norm(r)
    return jnp.where(size == 0, 0.0, size / _norm(fx))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=1))
