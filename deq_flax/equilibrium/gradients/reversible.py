"""The gradient of the reversible iteration (McCallum et al. 2025), by running it backward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients.base import closed_over
from deq_flax.equilibrium.loop import Solver, check_options, select_samples, solve_with_state
from deq_flax.equilibrium.shards import settled, varying
from deq_flax.equilibrium.solution import FlatMap, SolverStats


@dataclass(frozen=True)
class Reversible:
    """The exact gradient of an iteration that can be run backward, so that its states need not be kept.

    With b = relaxation, y_{n+1} = (1 - b) y_n + b f(z_n) and z_{n+1} = (1 - b) z_n + b f(y_{n+1}), from y_0 = z_0 (McCallum et
    al. 2025, reversible deep equilibrium models). Written as one sequence w_{2n} = z_n, w_{2n-1} = y_n this is
    w_{k+1} = (1 - b) w_{k-1} + b f(w_k): one evaluation a step, and backward w_{k-1} = (w_{k+1} - b f(w_k)) / (1 - b) with
    the same evaluation that the vector-Jacobian product needs. The value is the w_k of lowest residual. The gradient is that
    of the steps that led to it, exact whether or not they converged, and costs one evaluation and one product for each.

    Running backward amplifies rounding errors by up to 1 / (1 - b) a step, so the pair of states is kept every
    `checkpoint_every` steps and restored there.

    The `solver` of `fixed_point` gives tolerance, stop mode and limits; its rule for a step is not used. Reverse mode, forward
    over reverse (Hessian-vector products), vmap, scan and checkpoint work. Forward mode alone and reverse over reverse raise
    JAX's errors about custom_vjp and while_loop.

    Raises:
      TypeError: an option is not a number of Python, or not a whole one, where it must be.
      ValueError: an option is out of range.
    """

    relaxation: float = 0.5
    """Weight b of f in a step, in (0, 1); larger amplifies rounding errors more in the backward run."""
    checkpoint_every: int | None = 8
    """Steps between kept pairs of states. None keeps only the end: constant memory, for float64 or few steps."""

    def __post_init__(self):
        check_options(self, relaxation="(0, 1)", checkpoint_every="[1, inf)")

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        limit = jnp.asarray(solver.max_steps if max_steps is None else max_steps, jnp.int32)
        stepper = _TwoStep(
            solver.tol,
            solver.max_steps,
            solver.stop,
            self.relaxation,
            self.checkpoint_every or solver.max_steps,
            trace=solver.trace,
            trajectory_steps=solver.trajectory_steps,
            axis_name=solver.axis_name,
        )
        pure_f, floating, others = closed_over(f, x0)

        def forward(limit: jax.Array, x0: jax.Array, floating: list[Any], others: list[Any]) -> Any:
            f = lambda x: pure_f(x, floating, others)  # noqa: E731
            z, stats, state = solve_with_state(f, x0, stepper, limit, freeze=_freeze)
            return (z, stats), (stats.steps, state, floating, others)

        def backward(kept: Any, cotangent: Any) -> Any:
            best, state, floating, others = kept
            f = lambda x, floating: pure_f(x, floating, others)  # noqa: E731
            gradients = _run_backward(f, floating, state, best, cotangent[0], stepper)
            return None, jnp.zeros_like(cotangent[0]), gradients, None

        run = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
        run.defvjp(forward, backward)
        return run(limit, x0, floating, others)


class _State(NamedTuple):
    before: jax.Array
    """(B, N): w_{k-1}."""
    at: jax.Array
    """(B, N): w_k, the last iterate evaluated."""
    k: jax.Array
    """(B,) int32."""
    kept: jax.Array
    """(C + 1, 2, B, N): (w_{k-1}, w_k) for every k that is a multiple of `every`; the last slot is scratch for all others."""


@dataclass(frozen=True)
class _TwoStep(Solver):
    """The step w_{k+1} = (1 - relaxation) w_{k-1} + relaxation f(w_k)."""

    relaxation: float = 0.5
    every: int = 8

    def init(self, z: jax.Array) -> _State:
        slots = -(-self.max_steps // self.every)
        return _State(z, z, jnp.zeros(z.shape[0], jnp.int32), jnp.zeros((slots + 1, 2, *z.shape), z.dtype))

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: _State) -> tuple[jax.Array, _State]:
        before = state.at
        slot = jnp.where(k % self.every == 0, k // self.every, state.kept.shape[0] - 1)
        kept = jax.lax.dynamic_update_index_in_dim(state.kept, jnp.stack([before, z]), slot, axis=0)
        after = (1.0 - self.relaxation) * before + self.relaxation * (z + g)
        return after, _State(before, z, jnp.full_like(state.k, k), kept)


def _freeze(going: jax.Array, new: _State, old: _State) -> _State:
    """Keep the pair of a stopped sample. Later checkpoints are written for it too, but it is not run backward from them."""
    return _State(*select_samples(going, new[:3], old[:3]), new.kept)


class _Backward(NamedTuple):
    k: jax.Array
    before: jax.Array
    at: jax.Array
    to_at: jax.Array
    """(B, N): the cotangent of w_k, without the contribution of the returned value."""
    to_before: jax.Array
    """(B, N): the cotangent of w_{k-1}."""
    gradients: list[Any]


def _run_backward(
    f: Callable[[jax.Array, list[Any]], jax.Array],
    floating: list[Any],
    state: _State,
    best: jax.Array,
    cotangent: jax.Array,
    stepper: _TwoStep,
) -> list[Any]:
    """Return the gradient with respect to `floating`, given the cotangent (B, N) of the iterates w_best, best (B,)."""
    b, every = stepper.relaxation, stepper.every

    def body(s: _Backward) -> _Backward:
        here = (s.k <= state.k)[:, None]
        arriving = s.to_at + jnp.where((s.k == best.astype(jnp.int32))[:, None], cotangent, 0.0)
        value, pullback = jax.vjp(f, s.before, floating)
        to_state, to_floating = pullback(b * jnp.where(here, arriving, 0.0))
        earlier = (s.at - b * value) / (1.0 - b)
        earlier, before = jnp.where((s.k - 1) % every == 0, state.kept[(s.k - 1) // every], jnp.stack([earlier, s.before]))
        old = (s.before, s.at, s.to_at, s.to_before)
        new = (earlier, before, s.to_before + to_state, (1.0 - b) * arriving)
        return _Backward(
            s.k - 1,
            *(jnp.where(here, n, o) for n, o in zip(new, old, strict=True)),
            jax.tree.map(jnp.add, s.gradients, to_floating),
        )

    zero, steps = jnp.zeros_like(cotangent), jnp.max(state.k, initial=0)
    # The gradient of what is the same on several shards is their sum, in every step: they take as many steps as each other.
    together = {axis for leaf in floating for axis in varying(zero) - varying(leaf)} & varying(steps)
    if together:
        steps = jax.lax.pmax(steps, tuple(sorted(together)))
    start = _Backward(steps, state.before, state.at, zero, zero, jax.tree.map(jnp.zeros_like, floating))
    return jax.lax.while_loop(lambda s: s.k > 0, body, settled(body, start)).gradients
