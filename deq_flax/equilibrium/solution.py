"""The result of a solve: `Solution` and its `SolverStats`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.shards import AxisName, maximum, total


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SolverStats:
    """Statistics of a solve, per sample, with r(z) = f(z) - z and norms over everything but the batch axis.

    Every array has a float dtype, because the auxiliary output of `jax.lax.custom_root` must.
    """

    nfe: jax.Array
    """Scalar: evaluations of f on the batch."""
    steps: jax.Array
    """(B,): step number of the returned iterate; 0 is the initial guess. Indexes the traces."""
    relative_residual: jax.Array
    """(B,): ||r(z)|| / max(||f(z)||, eps min(||z_0||, ||f(z_0)||)) of the returned iterate, eps the rounding unit of the dtype.

    Near a solution of zero, ||r(z)|| / ||f(z)|| need not fall, however small z becomes. So f(z) counts as no smaller than the
    rounding errors of where the solve started: a floor without units, and so low that a start a million times too large leads
    to no false convergence, as a fixed number or a larger share of ||z_0|| does. A start from zero has no floor.
    """
    absolute_residual: jax.Array
    """(B,): ||r(z)|| of the returned iterate."""
    converged: jax.Array
    """(B,): 1.0 where the residual of the solver's stop mode is at most its tolerance, else 0.0."""
    relative_trace: jax.Array | None = None
    """(B, max_steps): relative residual of each iterate, padded with that of the returned one; None without `Solver.trace`."""
    absolute_trace: jax.Array | None = None
    """(B, max_steps): absolute residual of each iterate, likewise."""
    trajectory: jax.Array | None = None
    """(S, B, N): flat iterates of `Solver.trajectory_steps`. `fixed_point` moves them to `Solution.trajectory`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Solution:
    """A fixed point, or the best iterate found: `stats.converged` distinguishes the two."""

    value: Any
    """A pytree like the initial guess."""
    stats: SolverStats
    """Statistics of the forward solve; they carry no gradient."""
    trajectory: Any = None
    """A pytree like the initial guess with a leading axis for the iterates of `Solver.trajectory_steps`; None without them."""
    aux: Any = None
    """The auxiliary output of f at `value`; None unless `fixed_point` was called with `has_aux=True`."""


def over_samples(change: Callable[[jax.Array], jax.Array], solution: Solution) -> Solution:
    """Return the solution with a function applied to all arrays of value and statistics whose leading axis is the batch."""
    per_sample: dict[str, Any] = {
        name: change(array) for name, array in vars(solution.stats).items() if name != "nfe" and array is not None
    }
    return replace(solution, value=jax.tree.map(change, solution.value), stats=replace(solution.stats, **per_sample))


FlatMap = Callable[[jax.Array], jax.Array]
"""f: (B, N) -> (B, N), a map of flat states. A row is a sample; rows do not depend on each other."""

Solve = Callable[..., tuple[Solution, jax.Array | None]]
"""(f, z0, *inputs) -> (solution of z = f(z, *inputs) from z0, Jacobian loss there or None). Models take one as the argument
`solve`. Inputs have the batch as their leading axis. f may close over all of them; only samples whose inputs are named can be
solved in parts of the batch.
"""


def norm(x: jax.Array, axis_name: AxisName | None = None) -> jax.Array:
    """Return the Euclidean norm over the last axis, and over the shards of `axis_name`: (B, N) -> (B,), one per sample."""
    return norms(lambda x: (x,), x, axis_name=axis_name)[0]


def norms(
    arrays: Callable[..., tuple[jax.Array, ...]], *operands: jax.Array, axis_name: AxisName | None = None
) -> tuple[jax.Array, ...]:
    """Return the norms, (B, N) -> (B,), of arrays(*operands), as `norm` does, right at any scale.

    In float32 the squares of numbers below 1e-19 are zero and those above 1e19 infinite. So where the sum of squares of a
    sample is outside the range in which it can be trusted, it is summed again, scaled; else that takes no time. `arrays` is
    evaluated again then, so that the compiler need not store what it gives just for that case.
    """
    squares = [total(jnp.sum(x * x, axis=-1), axis_name) for x in arrays(*operands)]
    limits = jnp.finfo(squares[0].dtype)
    # Elements whose squares are lost, below `tiny`, are then less than eps of the sum for up to 1/eps elements.
    trusted = [(s >= limits.tiny / limits.eps**2) & (s <= limits.max) for s in squares]

    def plain(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.sqrt(s) for s in squares)

    def scaled(*operands: jax.Array) -> tuple[jax.Array, ...]:
        again = []
        for x in arrays(*operands):
            scale = power_of_two(x, axis_name)
            again.append(scale[..., 0] * jnp.sqrt(total(jnp.sum(jnp.square(x / scale), axis=-1), axis_name)))
        return tuple(jnp.where(ok, a, b) for ok, a, b in zip(trusted, plain(), again, strict=True))

    return jax.lax.cond(_all(jnp.stack(trusted)), plain, scaled, *operands)


def _over_vmap(reduction: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Give one answer for a whole vmap: `lax.cond` then still takes one branch; with one for each problem, it takes all."""
    reduce = jax.custom_batching.custom_vmap(lambda x: reduction(x))
    reduce.def_vmap(lambda size, batched, x: (reduce(x), False))
    return reduce


_all = _over_vmap(jnp.all)
largest_index = _over_vmap(partial(jnp.max, initial=0))
"""The largest entry of an array of integers, and under `vmap` of the arrays of all problems; 0 at least."""


def power_of_two(x: jax.Array, axis_name: AxisName | None = None) -> jax.Array:
    """Return a power of two near the largest entry of each sample, (B, N) -> (B, 1); a constant where that is 0 or not finite.

    It is the same on all shards of `axis_name`. Multiplying or dividing by it changes exponents alone, so it rounds nothing.
    """
    limits = jnp.finfo(x.dtype)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0))
    largest = maximum(largest, axis_name)
    sound = (largest > 0) & jnp.isfinite(largest)
    # Its inverse must be a normal number too.
    largest = jnp.where(sound, jnp.clip(largest, 4 * limits.tiny, limits.max / 8), 1.0)
    return largest / jnp.frexp(largest)[0]


def decomposed(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return S (B, m), V (B, m, m), sqrt(E) and 1 / sqrt(E) (B, m) of Gram matrices S V E V^T S, (B, m, m).

    S has the lengths of the vectors, 1 for those of length 0. Where vectors depend on others, sqrt(E) and its inverse are 0.
    """
    size = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
    size = jnp.where(size > 0, size, 1.0)
    values, basis = jnp.linalg.eigh(gram / size[:, :, None] / size[:, None, :])
    independent = values > 100 * jnp.finfo(gram.dtype).eps * values[:, -1:]
    root = jnp.sqrt(jnp.where(independent, values, 1.0))
    return size, basis, jnp.where(independent, root, 0.0), jnp.where(independent, 1.0 / root, 0.0)


def scale_of(g: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Return a power of two near the norm of each residual g, (B, N) -> (B, 1).

    A solver divides residuals by it before it takes inner products, which in float32 range from 1e-38 to 1e38. The sum of
    squares is the one that the loop has taken; where it is 0 or infinite, a guess is good enough.
    """
    square = total(jnp.sum(g * g, axis=-1), axis_name)[:, None]
    far = 2.0 ** (0.625 * jnp.finfo(g.dtype).maxexp)
    near = jnp.where(square == 0, 1.0 / far, jnp.minimum(jnp.sqrt(square), far))
    return power_of_two(near)


def relative_residual(absolute: jax.Array, size: jax.Array) -> jax.Array:
    """Return ||f(z) - z|| / ||f(z)||, (B,), from both norms (B,); a residual of zero is zero relative to any f(z)."""
    return jnp.where(absolute == 0, 0.0, absolute / size)
