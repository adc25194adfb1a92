"""The base class of solvers, and the loop that runs them: evaluation, stopping, best iterate, traces.

B is the batch, N the elements of a sample's state. Every sample is a problem of its own with its own norms. A sample that has
reached the tolerance, or whose evaluation is not finite, stays at its best iterate from then on: a diverging sample does not
affect the others, and a result does not depend on the rest of the batch. The loop ends when every sample has stopped.

That holds for an f that treats each sample by itself. Where f couples samples, one that has stopped may lose its tolerance when
others move: it is evaluated with them anyway, and then goes on. What is reported is measured at what is returned.
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.shards import AxisName, axes_of, cast, settled, varying
from deq_flax.equilibrium.solution import FlatMap, SolverStats, norm, norms, relative_residual

StopMode = Literal["relative", "absolute"]


@dataclass(frozen=True)
class Solver:
    """Base class of solvers: a rule for the next iterate. The loop owns evaluation, counting, stopping and the best iterate.

    A solver is a frozen dataclass of Python numbers: hashable, so that it can be a static argument of `jax.jit`. It works on
    flat states (B, N), each sample by itself. A subclass adds options as fields and defines `init` and `step`.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be; or axis_name is no name.
      ValueError: an option is out of range.
    """

    tol: float = 1e-6
    """Residual at which a sample stops; that of the adjoint equation is always relative."""
    max_steps: int = 50
    """Limit on the evaluations of f."""
    stop: StopMode = "relative"
    """Residual that is compared with the tolerance: 'relative', ||f(z) - z|| / ||f(z)||, or 'absolute', ||f(z) - z||.
    Near a solution of zero the former has a floor, see `SolverStats`; the latter suits where the scale of z is known."""
    trace: bool = field(default=False, kw_only=True)
    """Record the residual of every iterate."""
    trajectory_steps: tuple[int, ...] = field(default=(), kw_only=True)
    """Steps whose iterates are recorded in `Solution.trajectory`: increasing, below max_steps; 0 is the initial guess."""
    axis_name: AxisName | None = field(default=None, kw_only=True)
    """Axes of `jax.shard_map` over which a sample's state is spread: norms and inner products are sums over their shards, which
    so take the same steps and stop together. Needed if f communicates over an axis; see `fixed_point`."""

    def __post_init__(self):
        name, steps = type(self).__name__, self.trajectory_steps
        if self.stop not in ("relative", "absolute"):
            raise ValueError(f"{name}: stop must be 'relative' or 'absolute', not {self.stop!r}")
        check_options(self, tol="[0, inf)", max_steps="[1, inf)")
        check_axis_name(name, self.axis_name)
        sound = lambda k: isinstance(k, numbers.Integral) and 0 <= k < self.max_steps  # noqa: E731
        if not isinstance(steps, tuple) or list(steps) != sorted(set(filter(sound, steps))):
            raise ValueError(
                f"{name}: trajectory_steps must be a tuple of increasing steps below {self.max_steps}, not {steps!r}"
            )

    def init(self, z: jax.Array) -> Any:
        """Return the solver's own state for an initial guess z (B, N)."""
        raise NotImplementedError

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Return the next iterate (B, N) and state, given iterate z number k = 0, 1, ... and its residual g = f(z) - z."""
        raise NotImplementedError

    def with_limits(self, *, tol: float | None = None, max_steps: int | None = None, axis_name: AxisName | None = None) -> Self:
        """Return this solver with other limits or axes, where given, and without traces and trajectory."""
        return replace(
            self,
            tol=self.tol if tol is None else tol,
            max_steps=self.max_steps if max_steps is None else max_steps,
            trace=False,
            trajectory_steps=(),
            axis_name=axis_name or self.axis_name,
        )

    def for_linear(self) -> Self:
        """Return this solver for linear equations, which stop by the relative residual.

        An absolute tolerance says nothing about them: their solution scales with the right-hand side, an adjoint one with the
        loss. It is replaced by the default relative tolerance, `Solver.tol`.
        """
        return self if self.stop == "relative" else replace(self, stop="relative", tol=Solver.tol)

    def solve_linear(self, jacobian: FlatMap, b: jax.Array) -> tuple[jax.Array, SolverStats]:
        """Solve x = jacobian(x) + b for a linear `jacobian`, from x = b; see `LinearSolver`.

        Raises:
          ValueError: `stop` is 'absolute'.
        """
        if self.stop == "absolute":
            raise ValueError(f"{type(self).__name__}: linear equations are solved to a relative residual: use for_linear()")
        return solve(lambda x: jacobian(x) + b, b, self)


def check_options(options: Any, **intervals: str) -> None:
    """Check numbers among the fields of a solver or gradient, each against an interval, such as relaxation="(0, 1]".

    A field of type int must be a whole number, one of type float a number; one that may be None is not checked then.

    Raises:
      TypeError, ValueError: as of `check_number`.
    """
    types = {option.name: option.type for option in fields(options)}
    for name, interval in intervals.items():
        value, kind = getattr(options, name), types[name]
        if value is not None or kind in (int, float):
            check_number(f"{type(options).__name__}: {name}", value, interval, whole=kind in (int, int | None))


def check_number(name: str, value: Any, interval: str, *, whole: bool) -> None:
    """Check an option that is fixed in a program.

    Raises:
      TypeError: it is no number, or not a whole one. A traced value is neither.
      ValueError: it is not in the interval.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        shown = "an array or a traced value" if hasattr(value, "dtype") else repr(value)
        raise TypeError(f"{name} must be a {'whole ' * whole}number of Python, not {shown}")
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    if not (above and (value <= high if interval[-1] == "]" else value < high)):
        raise ValueError(f"{name} must be in {interval}, not {value}")


def check_dtype(name: str, dtype: Any) -> None:
    """Check the name of a floating-point type, or None.

    Raises:
      TypeError: it is no string.
      ValueError: there is no such type.
    """
    if dtype is not None and not isinstance(dtype, str):
        raise TypeError(f"{name} must be the name of a type, such as 'bfloat16', or None, not {dtype!r}")
    try:
        known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{name}: {dtype!r} is no floating-point type: take bfloat16, float16, float32 or float64")


def check_axis_name(name: str, axis_name: Any) -> None:
    """Raise TypeError unless it is None, the name of an axis, or a tuple of names."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(axis, str) for axis in names):
        raise TypeError(f"{name}: axis_name must be the name of an axis or a tuple of names, not {axis_name!r}")


class _Best(NamedTuple):
    """The best iterate (B, N) so far, its rank, its residuals and its step, all (B,)."""

    z: jax.Array
    rank: jax.Array
    relative: jax.Array
    absolute: jax.Array
    step: jax.Array


class _Loop(NamedTuple):
    k: jax.Array
    z: jax.Array
    active: jax.Array
    alive: jax.Array
    """(B,): true while every evaluation has been finite."""
    coupled: jax.Array
    """True once the residual of a stopped sample has changed, or may have: samples depend on each other."""
    unchecked: jax.Array
    """True where the loop would end, a sample has stopped in the last evaluation, and others return an earlier iterate."""
    floor: jax.Array
    """(B,): the rounding error of ||z_0||, below which f(z) does not count as smaller."""
    first: jax.Array
    """(B,): ||f(z_0)||, the size from which the solve starts."""
    best: _Best
    solver: Any
    traces: tuple[jax.Array, jax.Array] | None
    trajectory: jax.Array | None


Freeze = Callable[[jax.Array, Any, Any], Any]
"""(going (B,), new, old) -> solver state: new for the samples that go on, old for those that have stopped."""


def solve(f: FlatMap, z0: jax.Array, solver: Solver, max_steps: jax.Array | int | None = None) -> tuple[jax.Array, SolverStats]:
    """Iterate toward z = f(z) on flat states.

    Args:
      f: (B, N) -> (B, N), each sample by itself.
      z0: (B, N) initial guess.
      solver: rule for the next iterate, tolerance and limit.
      max_steps: lower limit on the evaluations of f for this call, an int or a traced int32 scalar; `solver.max_steps`
        remains the upper bound.

    Returns:
      The best iterate, (B, N), and statistics. The best is the one within the tolerance, else that of the lowest residual: the
      absolute one, or the one relative to the larger of ||f(z)|| and ||f(z0)||, by the solver's stop mode. A sample whose first
      evaluation is not finite returns its z0, with a non-finite residual and `converged` 0.
    """
    z, stats, _ = solve_with_state(f, z0, solver, max_steps, freeze=never_frozen)
    return z, stats


def never_frozen(going: jax.Array, new: Any, old: Any) -> Any:
    """Let a solver's state go on after its samples have stopped: a `Freeze` that costs nothing."""
    return new


def select_samples(which: jax.Array, new: Any, old: Any) -> Any:
    """Return `new` for the samples in `which` (B,) and `old` for the others, in every leaf (B, ...).

    As a `Freeze` it reads and writes the solver's whole state in each iteration.
    """
    return jax.tree.map(lambda n, o: jnp.where(jnp.reshape(which, (-1,) + (1,) * (n.ndim - 1)), n, o), new, old)


def change_where(which: jax.Array, change: Callable[[Any], Any], state: Any) -> Any:
    """Return change(state) for the samples in `which`, () or (B,), and a state unchanged for the others.

    A loop of one turn or none works in place, where `lax.cond` copies the state in every step, and `vmap` makes both branches
    run.
    """

    def turn(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        which, state = carry
        changed = change(state)
        return jnp.zeros_like(which), changed if which.ndim == 0 else select_samples(which, changed, state)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), turn, settled(turn, (which, state)))[1]


def solve_with_state(
    f: FlatMap,
    z0: jax.Array,
    solver: Solver,
    max_steps: jax.Array | int | None = None,
    *,
    freeze: Freeze = select_samples,
) -> tuple[jax.Array, SolverStats, Any]:
    """Run `solve` and also return the solver's own state after the last finite evaluation of each sample."""
    loop = iteration(solver, max_steps, freeze=freeze)

    def body(s: _Loop) -> _Loop:
        return loop.advance(s, f(s.z))

    start = settled(body, loop.start(z0))
    end = body(start) if solver.max_steps == 1 else jax.lax.while_loop(loop.keep_going, body, start)
    return end.best.z, statistics(end, solver), end.solver


class Iteration(NamedTuple):
    """The parts of the loop, for a batch of any size."""

    start: Callable[[jax.Array], _Loop]
    """Initial guess (B, N) -> state of the loop."""
    keep_going: Callable[[_Loop], jax.Array]
    """State -> True while some sample has not stopped."""
    advance: Callable[[_Loop, jax.Array], _Loop]
    """(state, f of its iterates `z`) -> next state."""


def iteration(solver: Solver, max_steps: jax.Array | int | None = None, *, freeze: Freeze) -> Iteration:
    """Return the parts of a solve: `solve` runs them on a batch, a queue on each of its slots."""
    limit = solver.max_steps if max_steps is None else jnp.clip(max_steps, 1, solver.max_steps)
    trajectory_steps = jnp.asarray(solver.trajectory_steps, jnp.int32)

    def keep_going(s: _Loop) -> jax.Array:
        # At the limit, samples return iterates of different steps: if they are coupled, one more evaluation measures those.
        return (s.k < limit + s.coupled.astype(jnp.int32)) & (jnp.any(s.active) | s.unchecked)

    def advance(s: _Loop, fz: jax.Array) -> _Loop:
        g = fz - s.z
        absolute, size = norms(lambda fz, z: (fz - z, fz), fz, s.z, axis_name=solver.axis_name)
        first = jnp.where(s.k == 0, size, s.first)
        relative = relative_residual(absolute, jnp.maximum(size, jnp.minimum(s.floor, first * jnp.finfo(first.dtype).eps)))
        residual = relative if solver.stop == "relative" else absolute
        # On the way to zero the relative residual does not fall, so iterates below the first size are ranked by the absolute
        # one. Where f is zero from the start, the rank is infinite at every other state: compare absolute ones there too.
        rank = relative_residual(absolute, jnp.maximum(size, first)) if solver.stop == "relative" else absolute
        tied = jnp.isinf(rank) & jnp.isinf(s.best.rank) & (absolute < s.best.absolute)
        running = s.active & (s.k < limit)
        better = running & ((rank < s.best.rank) | tied | (residual <= solver.tol) | (s.k == 0))
        # A change by more than rounding, which on some devices differs from one evaluation to the next.
        moved = jnp.abs(absolute - s.best.absolute) > 1e-3 * s.best.absolute + 8 * jnp.finfo(fz.dtype).eps * size
        coupled = s.coupled | jnp.any(s.alive & ~running & moved)
        measured = better | (coupled & ~running)
        best = _Best(
            z=jnp.where(better[:, None], s.z, s.best.z),
            # A stopped sample is evaluated at its best iterate again, and if samples are coupled with another result.
            rank=jnp.where(measured, rank, s.best.rank),
            relative=jnp.where(measured, relative, s.best.relative),
            absolute=jnp.where(measured, absolute, s.best.absolute),
            step=jnp.where(better, s.k.astype(fz.dtype), s.best.step),
        )
        traces = s.traces and (
            s.traces[0].at[:, s.k].set(jnp.where(s.active, relative, best.relative)),
            s.traces[1].at[:, s.k].set(jnp.where(s.active, absolute, best.absolute)),
        )
        trajectory = s.trajectory
        if trajectory is not None:
            trajectory = jnp.where((trajectory_steps == s.k)[:, None, None], s.z[None], trajectory)
        alive = s.alive & jnp.isfinite(absolute) & jnp.isfinite(size)
        going = alive & running
        active = alive & (running | coupled) & (residual > solver.tol)
        with jax.default_matmul_precision("highest"):  # accelerators round operands by default: a floor for the residual
            z, state = solver.step(s.k, s.z, g, s.solver)
        state = freeze(going, state, s.solver)
        z = jnp.where((active & (s.k + 1 < limit))[:, None], z, best.z)
        last = ~jnp.any(active) | (s.k + 1 >= limit)
        unchecked = last & jnp.any(running & (residual <= solver.tol)) & jnp.any(running & ~better)
        return _Loop(s.k + 1, z, active, alive, coupled | unchecked, unchecked, s.floor, first, best, state, traces, trajectory)

    def start(z0: jax.Array) -> _Loop:
        batch = z0.shape[:1]
        infinite = jnp.full(batch, jnp.inf, z0.dtype)
        blank = jnp.zeros((*batch, solver.max_steps), z0.dtype)
        return _Loop(
            k=cast(jnp.zeros((), jnp.int32), varying(z0) - axes_of(solver.axis_name)),  # shards that stop apart count apart
            z=z0,
            active=jnp.ones(batch, bool),
            alive=jnp.ones(batch, bool),
            coupled=jnp.zeros((), bool),
            unchecked=jnp.zeros((), bool),
            # The compiler would evaluate the norm of a constant guess itself, which takes it seconds if the guess is large.
            floor=norm(jax.lax.optimization_barrier(z0), solver.axis_name) * jnp.finfo(z0.dtype).eps,
            first=infinite,
            best=_Best(z0, infinite, infinite, infinite, jnp.zeros(batch, z0.dtype)),
            solver=solver.init(z0),
            traces=(blank, blank) if solver.trace else None,
            trajectory=jnp.zeros((len(solver.trajectory_steps), *z0.shape), z0.dtype) if solver.trajectory_steps else None,
        )

    return Iteration(start, keep_going, advance)


def statistics(end: _Loop, solver: Solver) -> SolverStats:
    """Return the statistics of a loop that has ended."""
    best = end.best
    residual = best.relative if solver.stop == "relative" else best.absolute
    relative_trace = absolute_trace = None
    if end.traces is not None:
        never_run = (jnp.arange(solver.max_steps, dtype=jnp.int32) >= end.k)[None]
        relative_trace = jnp.where(never_run, best.relative[:, None], end.traces[0])
        absolute_trace = jnp.where(never_run, best.absolute[:, None], end.traces[1])
    trajectory = None
    if end.trajectory is not None:
        reached = jnp.asarray(solver.trajectory_steps, jnp.int32) < end.k
        trajectory = jnp.where(reached[:, None, None], end.trajectory, best.z[None])
    return SolverStats(
        nfe=end.k.astype(best.z.dtype),
        steps=best.step,
        relative_residual=best.relative,
        absolute_residual=best.absolute,
        converged=(residual <= solver.tol).astype(best.z.dtype),
        relative_trace=relative_trace,
        absolute_trace=absolute_trace,
        trajectory=trajectory,
    )
