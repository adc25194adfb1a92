"""Broyden's good method, on one buffer of steps.

Let g(z) = f(z) - z, d_j = -H_j g_j the direction from iterate j, s_j = l_j d_j the step of length l_j along it (1 without a
line search), and y_j = g_{j+1} - g_j. The Sherman-Morrison form of the update of the inverse Jacobian estimate H (Broyden 1965;
Bai et al. 2019, eq. 9) is

    H_{j+1} = H_j + u_j s_j^T H_j,    u_j = (s_j - H_j y_j) / (s_j . H_j y_j).

Storing the rank-one terms takes two buffers, each read twice a step. But u_j is itself a combination of two directions (Kelley
1995, section 7.3), because H_j y_j = H_j g_{j+1} + d_j and d_{j+1} = -H_{j+1} g_{j+1}:

    s_j . H_j y_j = l_j (d_j . H_j g_{j+1} + |d_j|^2),    u_j = (d_{j+1} + (l_j - 1) d_j) / (l_j |d_j|^2).

So H = -c I + D^T M D with the directions as rows of D and a small matrix M, which gains a row a step: u_j s_j^T H_j adds
d_j^T H_j / |d_j|^2 to the row of d_{j+1}, and (l_j - 1) times that to the row of d_j. A step reads one buffer twice, and of a
large state no more of it than the blocks that hold directions.
"""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from deq_flax.equilibrium.loop import Solver, change_where, check_dtype, check_options, select_samples
from deq_flax.equilibrium.shards import AxisName, total
from deq_flax.equilibrium.solution import decomposed, largest_index, norm, scale_of
from deq_flax.equilibrium.solvers.history import combined, dots

BLOCK = 8
"""Rows of D in a block."""
CUT_FROM = 4096
"""Elements of all samples from which D is cut into blocks: below, to read a row costs less than to choose what to read."""


class BroydenState(NamedTuple):
    """The estimate H = -c I + D^T M D of the inverse Jacobian of f(z) - z. Steps and residuals are in units of `scale`."""

    directions: tuple[jax.Array, ...]
    """(B, rows, N) each, of type `history_dtype`: D in blocks of rows, of which those without a direction yet are not read."""
    core: jax.Array
    """(B, m + 1, m): M; row and column j for row j of D, row m for a pending direction that D has no row for."""
    multiple: jax.Array
    """(B,): c."""
    gram: jax.Array | None
    """(B, m, m): D D^T; None if the memory is not bounded."""
    pending: jax.Array
    """(B, N): the direction that led to the current iterate, exact in the type of D, which it enters in the next call."""
    slot: jax.Array
    """(B,) int32: the row of D that it will take; M already has its row. -1 before the first step."""
    scale: jax.Array
    """(B, 1): a power of two near g_0."""
    search: "_Search | None"


class _Search(NamedTuple):
    """State of the backtracking line search."""

    base: jax.Array
    """(B, N): the iterate the step starts from."""
    highest: jax.Array
    """(B,): the largest |g|^2 of the accepted iterates; -inf before the first."""
    length: jax.Array
    """(B,): l, the step length under trial."""


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method: superlinear near a solution, even where Picard iteration diverges.

    By default all steps are kept: max_steps - 1 copies of z, 49 for the default limit. With a bounded `memory` the estimate is
    reduced whenever it is full: what it adds to H_0 is projected onto the span of its leading left singular vectors, two thirds
    as many as the memory (after van de Rotten & Verduyn Lunel 2005, who drop one singular value in each step and store two
    vectors for each). H_0 is then -c I with c = |z_1 - z_0| / |g_1 - g_0|, between 0.05 and 1: a reduced estimate cannot afford
    to correct the size of most directions.

    Of 400 problems of 32 elements (benchmarks/battery.py), 100 evaluations solve 394 with all steps kept, 390 with `memory=20`,
    379 with 10 and 362 with 6, of which the last two take 21% and 36% more evaluations than the first. Where f costs
    nothing, a step with `memory=10` takes as long as one with 20 steps kept: below that, a bound saves no time.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be.
      ValueError: an option is out of range.
    """

    memory: int | None = None
    """Copies of z that are kept, at least 2; None: as many as there are steps."""
    line_search: bool = False
    """Halve a step, up to 3 times, while ||f(z) - z|| is above 10 times the largest of the accepted iterates (after Grippo,
    Lampariello & Lucidi 1986, who look at the last of them). Trial steps count as evaluations. A stricter test or more
    halvings would reject steps that lead to the solution: where cond(I - J) = 1000, residuals rise many times on the way."""
    history_dtype: str | None = None
    """Type of the kept steps, such as 'bfloat16' for half the memory and half the time to read them; None: that of z. A step
    is rounded before it is taken: what is kept is what was done, so the residual goes as low as without."""

    def __post_init__(self):
        super().__post_init__()
        check_options(self, memory="[2, inf)")
        check_dtype(f"{type(self).__name__}: history_dtype", self.history_dtype)

    @property
    def _bounded(self) -> bool:
        return self.memory is not None and self.memory < self.max_steps - 1

    def _blocks(self, slots: int, elements: int) -> list[int]:
        """Return the rows of each block. A bounded memory is one: it is full most of the time, and then its rows are mixed."""
        if self._bounded or elements < CUT_FROM or slots < 2 * BLOCK:
            return [slots]
        return [BLOCK] * (slots // BLOCK - 1) + [BLOCK + slots % BLOCK]

    def init(self, z: jax.Array) -> BroydenState:
        batch, size = z.shape
        slots = max(1, min(self.memory or self.max_steps, self.max_steps - 1))
        ones, kept = jnp.ones(batch, z.dtype), jnp.dtype(self.history_dtype or z.dtype)
        return BroydenState(
            directions=tuple(jnp.zeros((batch, rows, size), kept) for rows in self._blocks(slots, z.size)),
            core=jnp.zeros((batch, slots + 1, slots), z.dtype),
            multiple=ones,
            gram=jnp.zeros((batch, slots, slots), z.dtype) if self._bounded else None,
            pending=jnp.zeros_like(z),
            slot=jnp.full(batch, -1, jnp.int32),
            scale=jnp.ones((batch, 1), z.dtype),
            search=_Search(z, -jnp.inf * ones, ones) if self.line_search else None,
        )

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: BroydenState) -> tuple[jax.Array, BroydenState]:
        state = state._replace(scale=jnp.where(k == 0, scale_of(g, self.axis_name), state.scale))
        g = g / state.scale
        if state.search is not None:
            return _step_with_search(z, g, state, state.search, self.axis_name)
        slot = k - 1
        if self._bounded:
            slots = state.core.shape[2]
            # Full for the first time at k = slots, and then each time that the freed rows have been filled again.
            kept = _kept(slots)
            slot = jnp.where(k <= slots, k - 1, kept + (k - 1 - slots) % (slots - kept))
        state = _update(slot, jnp.ones(z.shape[:1], z.dtype), g, state, self.axis_name)
        return z + state.scale * state.pending, state


def _kept(slots: int) -> int:
    """Vectors that span a reduced estimate."""
    return max(1, 2 * slots // 3)


def _update(slot: jax.Array, length: jax.Array, g: jax.Array, state: BroydenState, axis_name: AxisName | None) -> BroydenState:
    """Learn from the residual g after a step of `length` (B,) along the pending direction, which takes row `slot`, () or (B,).

    The new pending direction is -H g.
    """
    pending, multiple, slots = state.pending, state.multiple, state.core.shape[2]
    if state.gram is not None:
        first = jnp.broadcast_to(slot == 0, length.shape)
        c = jax.lax.cond(
            jnp.any(first),
            lambda: jnp.where(first, _first_multiple(length, g, state, axis_name), 1.0),
            lambda: jnp.ones_like(length),
        )
        multiple, pending, length = multiple * c, pending * c[:, None], length / c

    # The write comes before every read of a block: XLA then updates it in place instead of copying it every step.
    directions = _written(state.directions, slot, pending)
    ends = list(accumulate(block.shape[1] for block in directions))

    def products(blocks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return D g and D d, (B, m), and D^T M D g, from the first blocks of D."""
        first, rows = [D.astype(g.dtype) for D in directions[:blocks]], ends[blocks - 1]
        along_g, along_d = (jnp.concatenate([dots(D, x) for D in first], axis=1) for x in (g, pending))
        along_g, along_d = (total(x, axis_name) for x in (along_g, along_d))
        weights = jnp.einsum("bij,bj->bi", state.core[:, :rows, :rows], along_g)
        parts = zip(jnp.split(weights, ends[: blocks - 1], axis=1), first, strict=True)
        h_g = sum(combined(D, w) for w, D in parts)
        rest = ((0, 0), (0, slots - rows))
        return jnp.pad(along_g, rest), jnp.pad(along_d, rest), jnp.asarray(h_g)

    filled = jnp.minimum(largest_index(slot) // BLOCK, len(ends) - 1)
    along_g, along_d, h_g = jax.lax.switch(filled, [partial(products, n + 1) for n in range(len(ends))])
    h_g = h_g - multiple[:, None] * g

    # 0: the row of the pending direction, 1: that of the one that follows it.
    row_of = jnp.arange(slots + 1, dtype=jnp.int32)[None] - jnp.reshape(slot, (-1, 1))
    square = jnp.sum(jnp.where(row_of[:, :-1] == 0, along_d, 0.0), axis=1)
    along_h_g = total(jnp.sum(pending * h_g, axis=1), axis_name)
    # No step yet, or a singular update: H stays as it is.
    good = jnp.abs(along_h_g + square) > 1e-8 * square
    both = jnp.where(good, along_h_g + square, 1.0)
    gain = jnp.where(good, square / both, 1.0)
    drift = jnp.where(good, (length - 1.0) * along_h_g / both, 0.0)
    direction = _rounded(-gain[:, None] * h_g - drift[:, None] * pending, state)

    row = jnp.einsum("bi,bij->bj", along_d, state.core[:, :slots]) - jnp.where(row_of[:, :-1] == 0, multiple[:, None], 0.0)
    row = jnp.where(good, 1.0 / jnp.where(good, square, 1.0), 0.0)[:, None] * row
    core = state.core + jnp.where(row_of == 0, (length - 1.0)[:, None], 0.0)[:, :, None] * row[:, None, :]
    core = jnp.where((row_of == 1)[:, :, None], row[:, None, :], core)
    updated = state._replace(
        directions=directions,
        core=core,
        multiple=multiple,
        pending=direction,
        slot=jnp.broadcast_to(slot + 1, state.slot.shape),
    )
    if state.gram is None:
        return updated
    here = row_of[:, :-1] == 0
    gram = jnp.where(here[:, :, None], along_d[:, None, :], jnp.where(here[:, None, :], along_d[:, :, None], state.gram))
    return change_where(slot == slots - 1, lambda state: _reduced(state, along_g, g, axis_name), updated._replace(gram=gram))


def _written(blocks: tuple[jax.Array, ...], slot: jax.Array, row: jax.Array) -> tuple[jax.Array, ...]:
    """Return the blocks with `row` (B, N) as number `slot`, () or (B,), of all their rows."""
    written, row = [], row.astype(blocks[0].dtype)
    for block in blocks:
        rows = block.shape[1]
        if jnp.ndim(slot) == 0:
            at = jnp.clip(slot, 0, rows - 1)
            new = jnp.where(slot == at, row, jax.lax.dynamic_index_in_dim(block, at, axis=1, keepdims=False))
            written.append(jax.lax.dynamic_update_index_in_dim(block, new, at, axis=1))
        else:
            here = jnp.arange(rows, dtype=jnp.int32)[None] == slot[:, None]
            written.append(jnp.where(here[:, :, None], row[:, None, :], block))
        slot = slot - rows
    return tuple(_rows_apart(block) for block in written)


def _rows_apart(block: jax.Array) -> jax.Array:
    """Have TPU's compiler lay out a block (B, rows, N) row by row.

    Left alone it lays a block that a switch reads out sample by sample, and to write a row then takes it longer than all reads.
    """
    by_row = Layout(major_to_minor=(1, 0, 2))
    return jax.lax.platform_dependent(block, tpu=lambda x: with_layout_constraint(x, by_row), default=lambda x: x)


def _rounded(direction: jax.Array, state: BroydenState) -> jax.Array:
    """Round a direction to what D can hold. A pair of casts would not do: a compiler may leave it out."""
    kept = jnp.finfo(state.directions[0].dtype)
    return jax.lax.reduce_precision(direction, kept.nexp, kept.nmant) if _is_rounded(state) else direction


def _is_rounded(state: BroydenState) -> bool:
    return jnp.finfo(state.directions[0].dtype).nmant < jnp.finfo(state.pending.dtype).nmant


def _first_multiple(length: jax.Array, g: jax.Array, state: BroydenState, axis_name: AxisName | None) -> jax.Array:
    """Return c = |z_1 - z_0| / |g_1 - g_0|, within 0.05 and 1, (B,), from the first step, whose direction is g_0, and g_1.

    Where D is rounded, so is c, to a power of two: D can then hold the first direction times c.
    """
    step, change = length * norm(state.pending, axis_name), norm(g - state.pending, axis_name)
    c = jnp.clip(step / jnp.where(change > 0, change, step), 0.05, 1.0)
    return jax.lax.reduce_precision(c, jnp.finfo(c.dtype).nexp, 0) if _is_rounded(state) else c


def _reduced(state: BroydenState, along_g: jax.Array, g: jax.Array, axis_name: AxisName | None) -> BroydenState:
    """Project D^T M D, in the span of D and the pending direction, onto its leading left singular vectors.

    The pending direction becomes -H g; `along_g` is D g.
    """
    assert state.gram is not None
    (directions,), slots, last = state.directions, state.core.shape[2], state.pending
    kept = _kept(slots)
    wide = directions.astype(g.dtype)
    along_last = total(jnp.einsum("bmn,bn->bm", wide, last), axis_name)[:, :, None]
    square = total(jnp.sum(last * last, axis=1), axis_name)[:, None, None]
    last_row = jnp.concatenate([jnp.swapaxes(along_last, 1, 2), square], axis=2)
    gram = jnp.concatenate([jnp.concatenate([state.gram, along_last], axis=2), last_row], axis=1)
    # [D, d] = S V sqrt(E) Q, with orthonormal rows of Q.
    size, basis, root, inverse = decomposed(gram)
    core = jnp.pad(state.core, ((0, 0), (0, 0), (0, 1))) * size[:, :, None] * size[:, None, :]
    factor = root[:, None, :] * basis
    core = jnp.einsum("bji,bjk,bkl->bil", factor, core, factor)
    leading = jnp.linalg.eigh(jnp.einsum("bij,bkj->bik", core, core))[1][:, :, -kept:]
    core = jnp.einsum("bij,bik,bkl->bjl", leading, core, leading)
    # The rows that are kept are combinations of D and d, and with the new pending direction one more is.
    mix = jnp.einsum("bij,bki,bi->bjk", leading, basis, inverse) / size[:, None, :]
    along_g = jnp.concatenate([along_g, total(jnp.sum(last * g, axis=1), axis_name)[:, None]], axis=1)
    weights = jnp.einsum("bij,bjk,bk->bi", core, mix, along_g)
    mix = jnp.concatenate([mix, -jnp.einsum("bi,bij->bj", weights, mix)[:, None]], axis=1)
    rows = jnp.einsum("bjk,bkn->bjn", mix[:, :, :slots], wide) + mix[:, :, slots:] * last[:, None, :]
    reduced = rows[:, :kept].astype(directions.dtype)
    # What the other rows hold has no weight until it is written over.
    return state._replace(
        directions=(_rows_apart(jax.lax.dynamic_update_slice_in_dim(directions, reduced, 0, axis=1)),),
        core=jnp.pad(core, ((0, 0), (0, slots + 1 - kept), (0, slots - kept))),
        gram=jnp.pad(jnp.einsum("bij,bik->bjk", leading, leading), ((0, 0), (0, slots - kept), (0, slots - kept))),
        pending=_rounded(rows[:, kept] + state.multiple[:, None] * g, state),
        slot=jnp.full_like(state.slot, kept),
    )


def apply_inverse_transpose(state: BroydenState, x: jax.Array, axis_name: AxisName | None = None) -> jax.Array:
    """Return H^T x, (B, N), for x (B, N) and the inverse Jacobian estimate H of g(z) = f(z) - z in a state."""
    with jax.default_matmul_precision("highest"):
        slots, directions = state.core.shape[2], jnp.concatenate(state.directions, axis=1).astype(x.dtype)
        along_x = jnp.pad(total(dots(directions, x), axis_name), ((0, 0), (0, 1)))
        here = jnp.arange(slots + 1, dtype=jnp.int32)[None] == state.slot[:, None]
        along_x = jnp.where(here, total(jnp.sum(state.pending * x, axis=1), axis_name)[:, None], along_x)
        weights = jnp.einsum("bij,bi->bj", state.core, along_x)
        return combined(directions, weights) - state.multiple[:, None] * x


def _step_with_search(
    z: jax.Array, g: jax.Array, state: BroydenState, search: _Search, axis_name: AxisName | None
) -> tuple[jax.Array, BroydenState]:
    """Accept the current iterate and go on from it, or try half the step, for each sample."""
    merit = total(jnp.sum(g * g, axis=1), axis_name)
    accept = (merit <= 100.0 * search.highest) | (search.length < 2.0**-2.5) | jnp.isinf(search.highest)
    updated = _update(state.slot, search.length, g, state, axis_name)
    # A direction is kept at its full length and in its own row: a rejected trial leaves the history as it is.
    length = jnp.where(accept, 1.0, 0.5 * search.length)
    updated = updated._replace(search=_Search(z, jnp.maximum(search.highest, merit), length))
    state = select_samples(accept, updated, state._replace(search=search._replace(length=length)))
    base = jnp.where(accept[:, None], z, search.base)
    return base + state.scale * length[:, None] * state.pending, state
