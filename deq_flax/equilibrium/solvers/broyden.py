"""Broyden's good method, on one buffer of steps.

Write s_k = z_{k+1} - z_k for the steps and H_k for the inverse Jacobian estimate of g(z) = f(z) - z, with H_0 = -I. The
Sherman-Morrison form of the update (Broyden 1965; Bai et al. 2019, eq. 9) is

    H_{k+1} = (I + u_k s_k^T) H_k,    u_k = (s_k - H_k y_k) / (s_k . H_k y_k),    y_k = g_{k+1} - g_k.

Storing the rank-one terms of H takes two buffers, each read twice a step. But the next direction d_{k+1} = -H_{k+1} g_{k+1} is
itself a multiple of u_k plus a multiple of s_k (Kelley 1995, section 7.3): with step lengths l_k, s_k = l_k d_k,

    u_k = a_k s_{k+1} + b_k s_k,    a_k = l_k / (l_{k+1} |s_k|^2),    b_k = (l_k - 1) / |s_k|^2,

so a buffer of the steps alone determines H. Applying the product of factors to g is then a triangular recursion in inner
products: c_j = -s_j . g + sum_{i<j} (s_j . u_i) c_i. The inverse of that triangular matrix grows by one row a step. A step
reads one buffer twice, half of what two buffers need, and stores half as much.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.loop import Solver
from deq_flax.equilibrium.shards import AxisName, total
from deq_flax.equilibrium.solution import scale_of_first


class BroydenState(NamedTuple):
    """History in a ring of m slots; s_j sits in slot j mod m. Steps and residuals are in units of `scale`."""

    steps: jax.Array
    """(B, m, N): s_j."""
    inverse: jax.Array
    """(B, m, m): c = inverse (-s . g), row and column j for s_j."""
    toward_next: jax.Array
    """(B, m): a_j; zero until s_{j+1} is known."""
    toward_self: jax.Array
    """(B, m): b_j."""
    newest: jax.Array
    """(B,) int32: j of the newest step in the ring; negative while it is empty."""
    pending: jax.Array
    """(B, N): the step that led to the current iterate; it enters the ring in the next call."""
    scale: jax.Array
    """(B, 1): a power of two near g_0."""
    search: "_Search | None"


class _Search(NamedTuple):
    """State of the backtracking line search."""

    base: jax.Array
    """(B, N): the iterate the step starts from."""
    merit: jax.Array
    """(B,): |g|^2 there."""
    length: jax.Array
    """(B,): l, the step length under trial."""
    count: jax.Array
    """(B,) int32: accepted steps."""


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method with H_0 = -I: superlinear near a solution, even where Picard iteration diverges.

    By default all steps are kept: max_steps - 1 copies of z, 49 for the default limit, unlike the bounded state of `Anderson`.
    At limits of 40 to 80 that takes 2 to 4 times the solver's own time per evaluation with `memory=10`. A bounded `memory`
    loses convergence on problems that take more evaluations than it spans: of 1950 (contractions, rotations, non-normal and
    ill-conditioned maps of 12 to 256 elements), 50 evaluations solve 1009 with all steps kept, 941 with `memory=30`, 824 with
    20 and 742 with 10. It loses nothing where about as many evaluations suffice. Bound it where memory is scarce.

    Raises:
      ValueError: an option is out of range.
    """

    memory: int | None = None
    """Iterates spanned by the kept steps, one more than the copies of z; past it the oldest step is dropped. None keeps all."""
    line_search: bool = False
    """Halve a step until ||f(z) - z||^2 falls (Armijo), up to 6 times. Trial steps count as evaluations."""

    def __post_init__(self):
        super().__post_init__()
        if self.memory is not None and self.memory < 2:
            raise ValueError(f"Broyden: memory must be None or at least 2, not {self.memory}")

    def init(self, z: jax.Array) -> BroydenState:
        batch, size = z.shape
        slots = max(1, min(self.memory or self.max_steps, self.max_steps) - 1)
        blank = jnp.zeros((batch, slots), z.dtype)
        search = None
        if self.line_search:
            ones = jnp.ones(batch, z.dtype)
            search = _Search(z, jnp.inf * ones, ones, jnp.zeros(batch, jnp.int32))
        return BroydenState(
            steps=jnp.zeros((batch, slots, size), z.dtype),
            inverse=jnp.zeros((batch, slots, slots), z.dtype),
            toward_next=blank,
            toward_self=blank,
            newest=jnp.full(batch, -1, jnp.int32),
            pending=jnp.zeros_like(z),
            scale=jnp.ones((batch, 1), z.dtype),
            search=search,
        )

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: BroydenState) -> tuple[jax.Array, BroydenState]:
        state = state._replace(scale=scale_of_first(k, g, state.scale, self.axis_name))
        g = g / state.scale
        if state.search is None:
            length = jnp.ones(z.shape[:1], z.dtype)
            direction, state = _update(k - 1, length, g, state, self.axis_name)
            return z + state.scale * direction, state._replace(pending=direction)
        return _step_with_search(z, g, state, state.search, self.axis_name)


def _update(
    newest: jax.Array, length: jax.Array, g: jax.Array, state: BroydenState, axis_name: AxisName | None
) -> tuple[jax.Array, BroydenState]:
    """Add the pending step, number `newest`, scalar or (B,), to the history. Returns direction -H g, (B, N), and state."""
    slots = state.inverse.shape[1]
    slot = newest % slots
    here = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None] == jnp.reshape(slot, (-1, 1)), state.toward_next.shape)
    # The write comes before every read of the buffer: XLA then updates it in place instead of copying it every step.
    if jnp.ndim(slot) == 0:
        steps = jax.lax.dynamic_update_index_in_dim(state.steps, state.pending, slot, axis=1)
    else:
        steps = jnp.where(here[:, :, None], state.pending[:, None, :], state.steps)
    along_g = total(jnp.einsum("bmn,bn->bm", steps, g), axis_name)
    along_step = total(jnp.einsum("bmn,bn->bm", steps, state.pending), axis_name)

    # The slot's previous step is dropped. The factor of the step before `pending` is complete, now that `pending` is known.
    a = jnp.where(here, 0.0, state.toward_next)
    b = jnp.where(here, 0.0, state.toward_self)
    row = jnp.einsum("bi,bij->bj", a * jnp.roll(along_step, -1, axis=1) + b * along_step, state.inverse)
    row = jnp.where(here, 1.0, row)
    inverse = jnp.where(here[:, :, None], row[:, None, :], jnp.where(here[:, None, :], 0.0, state.inverse))
    c = -jnp.einsum("bij,bj->bi", inverse, along_g)
    weights = jnp.roll(c * a, 1, axis=1) + c * b
    h_g = jnp.einsum("bm,bmn->bn", weights, steps) - g

    square = jnp.sum(jnp.where(here, along_step, 0.0), axis=1)
    along_h_g = total(jnp.sum(state.pending * h_g, axis=1), axis_name)
    denominator = along_h_g + square / length
    # No step yet, or a singular update: H stays as it is.
    good = jnp.abs(denominator) > 1e-8 * square
    safe = jnp.where(good, denominator, 1.0)
    gain = jnp.where(good, (square / length) / safe, 1.0)
    drift = jnp.where(good, (1.0 - 1.0 / length) * along_h_g / safe, 0.0)
    direction = -gain[:, None] * h_g - drift[:, None] * state.pending
    per_square = jnp.where(good, 1.0 / jnp.where(square > 0, square, 1.0), 0.0)
    a = jnp.where(here, (length * per_square)[:, None], a)
    b = jnp.where(here, ((length - 1.0) * per_square)[:, None], b)
    newest = jnp.broadcast_to(newest, state.newest.shape)
    return direction, BroydenState(steps, inverse, a, b, newest, state.pending, state.scale, state.search)


def apply_inverse_transpose(state: BroydenState, x: jax.Array, axis_name: AxisName | None = None) -> jax.Array:
    """Return H^T x, (B, N), for x (B, N) and the inverse Jacobian estimate H of g(z) = f(z) - z in a state.

    With S the rows s_j, U the rows u_j and L the triangular matrix `inverse`, H = -I - U^T L S.
    """
    slots = state.inverse.shape[1]
    along_x = total(jnp.einsum("bmn,bn->bm", state.steps, x), axis_name)
    here = jnp.arange(slots, dtype=jnp.int32)[None] == (state.newest % slots)[:, None]
    # The step after the newest in the ring is the pending one.
    pending_x = total(jnp.sum(state.pending * x, axis=1), axis_name)
    along_next = jnp.where(here, pending_x[:, None], jnp.roll(along_x, -1, axis=1))
    u_x = state.toward_next * along_next + state.toward_self * along_x
    weights = jnp.einsum("bij,bi->bj", state.inverse, u_x)
    return -x - jnp.einsum("bm,bmn->bn", weights, state.steps)


def _step_with_search(
    z: jax.Array, g: jax.Array, state: BroydenState, search: _Search, axis_name: AxisName | None
) -> tuple[jax.Array, BroydenState]:
    """Accept the current iterate and go on from it, or try half the step, for each sample."""
    merit = total(jnp.sum(g * g, axis=1), axis_name)
    accept = (merit <= (1.0 - 2e-4 * search.length) * search.merit) | (search.length < 2.0**-5.5)
    direction, updated = _update(search.count - 1, search.length, g, state, axis_name)
    # a_j was computed for a full next step; every halving of that step doubles it (below).
    keep = lambda new, old: jnp.where(jnp.reshape(accept, (-1,) + (1,) * (new.ndim - 1)), new, old)  # noqa: E731
    length = jnp.where(accept, 1.0, 0.5 * search.length)
    base = keep(z, search.base)
    pending = keep(direction, 0.5 * state.pending)
    newest = (
        jnp.arange(state.toward_next.shape[1], dtype=jnp.int32)[None]
        == ((search.count - 2) % state.toward_next.shape[1])[:, None]
    )
    toward_next = keep(updated.toward_next, jnp.where(newest, 2.0 * state.toward_next, state.toward_next))
    state = BroydenState(
        steps=keep(updated.steps, state.steps),
        inverse=keep(updated.inverse, state.inverse),
        toward_next=toward_next,
        toward_self=keep(updated.toward_self, state.toward_self),
        newest=keep(updated.newest, state.newest),
        pending=pending,
        scale=state.scale,
        search=_Search(base, keep(merit, search.merit), length, search.count + accept.astype(jnp.int32)),
    )
    return base + state.scale * pending, state
