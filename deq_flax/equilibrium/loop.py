"""The one loop that all solvers share: it evaluates f, stops, keeps the best iterate and records the trace.

Every member of the batch is a problem of its own. Norms are per member; a member that has reached the tolerance, or whose
evaluation is not finite, stays at its best iterate from then on, so it neither moves nor disturbs the others, and its answer
does not depend on who else is in the batch. The loop ends when every member has stopped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.solution import Solver, SolverStats


class _Best(NamedTuple):
    """The best iterate so far, with its residuals (B,) and step (B,)."""

    z: jax.Array
    relative: jax.Array
    absolute: jax.Array
    step: jax.Array


class _Loop(NamedTuple):
    k: jax.Array
    z: jax.Array
    active: jax.Array
    best: _Best
    solver: Any
    traces: tuple[jax.Array, jax.Array] | None
    sampled: jax.Array | None


Freeze = Callable[[jax.Array, Any, Any], Any]
"""(going (B,), new, old) -> the solver state with the members that have stopped as in `old`."""


def solve(
    f: Callable[[jax.Array], jax.Array], z0: jax.Array, solver: Solver, max_steps: jax.Array | int | None = None
) -> tuple[jax.Array, SolverStats]:
    """Iterate towards z = f(z) on flat states.

    Args:
      f: (B, N) -> (B, N), member by member.
      z0: (B, N) initial guess.
      solver: says how to step.
      max_steps: optional limit on the evaluations of f for this call, an int or a traced int32 scalar; `solver.max_steps`
        remains the upper bound.

    Returns:
      The iterate of lowest residual, (B, N), and statistics. NaN-safe: a member that starts at a non-finite evaluation
      returns its z0 with a non-finite residual and `converged` 0.
    """
    z, stats, _ = solve_with_state(f, z0, solver, max_steps, freeze=lambda going, new, old: new)
    return z, stats


def freeze_members(going: jax.Array, new: Any, old: Any) -> Any:
    """The `Freeze` that keeps every leaf, all (B, ...), of a member that has stopped. It reads and writes the whole state."""
    return jax.tree.map(lambda n, o: jnp.where(jnp.reshape(going, (-1,) + (1,) * (n.ndim - 1)), n, o), new, old)


def solve_with_state(
    f: Callable[[jax.Array], jax.Array],
    z0: jax.Array,
    solver: Solver,
    max_steps: jax.Array | int | None = None,
    *,
    freeze: Freeze = freeze_members,
) -> tuple[jax.Array, SolverStats, Any]:
    """`solve`, and the solver's own state after the last evaluation of each member that was finite."""
    limit = solver.max_steps if max_steps is None else jnp.clip(max_steps, 1, solver.max_steps)
    batch = z0.shape[:1]
    sample_steps = jnp.asarray(solver.sample_steps, jnp.int32)

    def keep_going(s: _Loop) -> jax.Array:
        return (s.k < limit) & jnp.any(s.active)

    def body(s: _Loop) -> _Loop:
        fz = f(s.z)
        g = fz - s.z
        absolute, size = _norm(g), _norm(fz)
        relative = jnp.where(absolute == 0, 0.0, absolute / size)
        residual = relative if solver.stop == "relative" else absolute
        best_residual = s.best.relative if solver.stop == "relative" else s.best.absolute
        # Where f is zero every other state is infinitely far, relatively: the absolute residual then tells.
        tied = jnp.isinf(residual) & jnp.isinf(best_residual) & (absolute < s.best.absolute)
        better = s.active & ((residual < best_residual) | tied | (s.k == 0))
        best = _Best(
            z=jnp.where(better[:, None], s.z, s.best.z),
            relative=jnp.where(better, relative, s.best.relative),
            absolute=jnp.where(better, absolute, s.best.absolute),
            step=jnp.where(better, s.k.astype(z0.dtype), s.best.step),
        )
        traces = s.traces and (
            s.traces[0].at[:, s.k].set(jnp.where(s.active, relative, best.relative)),
            s.traces[1].at[:, s.k].set(jnp.where(s.active, absolute, best.absolute)),
        )
        sampled = None if s.sampled is None else jnp.where((sample_steps == s.k)[:, None, None], s.z[None], s.sampled)
        going = s.active & jnp.isfinite(absolute) & jnp.isfinite(size)
        active = going & (residual > solver.tol)
        z, state = solver.step(s.k, s.z, g, s.solver)
        state = freeze(going, state, s.solver)
        return _Loop(s.k + 1, jnp.where(active[:, None], z, best.z), active, best, state, traces, sampled)

    infinite = jnp.full(batch, jnp.inf, z0.dtype)
    blank = jnp.zeros((*batch, solver.max_steps), z0.dtype)
    start = _Loop(
        k=jnp.zeros((), jnp.int32),
        z=z0,
        active=jnp.ones(batch, bool),
        best=_Best(z0, infinite, infinite, jnp.zeros(batch, z0.dtype)),
        solver=solver.init(z0),
        traces=(blank, blank) if solver.trace else None,
        sampled=jnp.zeros((len(solver.sample_steps), *z0.shape), z0.dtype) if solver.sample_steps else None,
    )
    end = jax.lax.while_loop(keep_going, body, start)
    return end.best.z, _stats(end, solver), end.solver


def _stats(end: _Loop, solver: Solver) -> SolverStats:
    best = end.best
    residual = best.relative if solver.stop == "relative" else best.absolute
    relative_trace = absolute_trace = None
    if end.traces is not None:
        never_run = (jnp.arange(solver.max_steps) >= end.k)[None]
        relative_trace = jnp.where(never_run, best.relative[:, None], end.traces[0])
        absolute_trace = jnp.where(never_run, best.absolute[:, None], end.traces[1])
    sampled = None
    if end.sampled is not None:
        reached = jnp.asarray(solver.sample_steps) < end.k
        sampled = jnp.where(reached[:, None, None], end.sampled, best.z[None])
    return SolverStats(
        nfe=end.k.astype(best.z.dtype),
        steps=best.step,
        relative_residual=best.relative,
        absolute_residual=best.absolute,
        converged=(residual <= solver.tol).astype(best.z.dtype),
        relative_trace=relative_trace,
        absolute_trace=absolute_trace,
        sampled=sampled,
    )


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=1))
