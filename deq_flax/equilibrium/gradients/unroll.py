"""The gradient of an unrolled iteration, or of its last steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients.base import stopped
from deq_flax.equilibrium.loop import Solver, check_options, solve
from deq_flax.equilibrium.shards import cast, varying
from deq_flax.equilibrium.solution import FlatMap, SolverStats

WITHIN_LIMIT = "within_limit"
"""Name, in a compiled program, of the choice whether a differentiated step is taken: it nearly always is."""


@dataclass(frozen=True)
class Unroll:
    """The gradient of `steps` applications of f from z0, of which the last ones are differentiated straight through.

    z_{k+1} = (1 - relaxation) z_k + relaxation f(z_k) + noise n_k, with n_k ~ N(0, 1). The value is the last iterate, not the
    best one: the iteration is the model, whether or not it converges. With `last`, the iterate before the last steps is held
    constant (truncated backpropagation through time): the gradient of models of recurrent depth, for which memory and time of
    the backward pass depend on `last` alone.

    A limit `max_steps` of the call shortens the iteration from its free steps on; it may be traced, so that the number of steps
    can be drawn anew each time (Anil et al. 2022) without compiling again. Where it is below `last`, as many steps as it
    allows are taken and differentiated.

    Of the solver, tolerance, stop mode and trajectory steps are used. The statistics are those of the last iterate and take
    one more evaluation, which the compiler drops when they are not read. Every mode of differentiation works.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be.
      ValueError: an option is out of range.
    """

    steps: int
    """Applications of f."""
    last: int | None = None
    """Steps at the end that are differentiated; None: all of them."""
    remat: bool = False
    """Keep the states alone and evaluate f again in the gradient (rematerialization); else memory holds every evaluation."""
    relaxation: float = 1.0
    """Weight of f(z) in a step, in (0, 1]; 1 is plain iteration."""
    noise: float = 0.0
    """Standard deviation of the noise that is added after every step, if there is a `key`."""
    key: jax.Array | None = None
    """Random key of the noise; None: no noise, as in evaluation."""

    def __post_init__(self):
        check_options(self, steps="[1, inf)", relaxation="(0, 1]", noise="[0, inf)")
        check_options(self, last=f"[1, {self.steps}]")

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        wanted = jnp.asarray(solver.trajectory_steps, jnp.int32)
        path = cast(jnp.zeros((len(wanted), *x0.shape), x0.dtype), varying(x0)) if solver.trajectory_steps else None

        def recorded(at: _At) -> jax.Array | None:
            # Steps beyond the last are padded with it, as the loop does: every iterate fills the slots of all later steps too.
            return None if at.path is None else jnp.where((wanted >= at.k)[:, None, None], jax.lax.stop_gradient(at.x), at.path)

        def step(f: FlatMap, at: _At) -> _At:
            return _At(at.k + 1, self._next(f, at.x, at.k), recorded(at))

        last = self.steps if self.last is None else self.last
        limit = self.steps if max_steps is None else jnp.clip(jnp.asarray(max_steps, jnp.int32), 1, self.steps)
        start = _At(jnp.zeros((), jnp.int32), x0, path)
        free = limit - last
        at = start if isinstance(free, int) and free <= 0 else _repeat(lambda at: step(stopped(f), at), free, start)
        once = jax.checkpoint(f) if self.remat else f
        if max_steps is None:
            at, _ = jax.lax.scan(lambda at, _: (step(once, at), None), at, None, length=last)
        else:
            # A conditional, not a selection: beyond the limit nothing is evaluated, and no gradient there can be NaN.
            @jax.named_scope(WITHIN_LIMIT)
            def conditional(at: _At, _: None) -> tuple[_At, None]:
                return jax.lax.cond(at.k < limit, lambda at: step(once, at), lambda at: at, at), None

            at, _ = jax.lax.scan(conditional, at, None, length=last)
        _, stats = solve(stopped(f), jax.lax.stop_gradient(at.x), solver.with_limits(max_steps=1))
        count = at.k.astype(stats.nfe.dtype)
        return at.x, replace(stats, nfe=stats.nfe + count, steps=stats.steps + count, trajectory=recorded(at))

    def _next(self, f: FlatMap, x: jax.Array, k: jax.Array) -> jax.Array:
        """Iterate number k + 1 from iterate number k."""
        after = f(x) if self.relaxation == 1 else (1.0 - self.relaxation) * x + self.relaxation * f(x)
        if self.noise and self.key is not None:
            after = after + self.noise * jax.random.normal(jax.random.fold_in(self.key, k), x.shape, x.dtype)
        return after


class _At(NamedTuple):
    k: jax.Array
    """int32: number of the iterate."""
    x: jax.Array
    """(B, N)."""
    path: jax.Array | None
    """(S, B, N): the iterates of `Solver.trajectory_steps`."""


def _repeat(step: Callable[[_At], _At], count: jax.Array | int, start: _At) -> _At:
    """Take `count` steps, none if it is not positive, in a loop whose length is no part of the program."""
    return jax.lax.while_loop(lambda at: at.k < count, step, start)
