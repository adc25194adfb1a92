"""`fixed_point`: the library in one function."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients import Gradient, Implicit, Map
from deq_flax.equilibrium.gradients.base import attach
from deq_flax.equilibrium.solution import Solution, Solver
from deq_flax.equilibrium.solvers.broyden import Broyden
from deq_flax.equilibrium.solvers.gmres import GMRES
from deq_flax.equilibrium.state import check_map, check_state, flattener

OnFailure = Literal["return", "nan", "zero_gradient"]
ON_FAILURE = ("return", "nan", "zero_gradient")


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    max_steps: jax.Array | int | None = None,
    probe: jax.Array | None = None,
    on_failure: OnFailure = "return",
    batched: bool = True,
) -> Solution:
    """Solve z = f(z, *args) and make the answer differentiable.

    >>> W = 0.3 * jax.random.normal(jax.random.key(0), (8, 8)) / 8**0.5
    >>> x = jnp.ones((2, 8))
    >>> sol = fixed_point(lambda z, x: jnp.tanh(z @ W + x), jnp.zeros_like(x), x)
    >>> sol.value.shape, bool(sol.stats.converged.all())
    ((2, 8), True)

    Args:
      f: called as f(z, *args); returns a pytree with the structure, shapes and dtypes of z. It may close over traced
        values and modules: they are differentiated like `args`.
      z0: initial guess: a pytree of real floating arrays that share a leading batch axis, (B, ...). The value of an earlier
        solution is a good one.
      *args: pytrees, handed to f as they are.
      solver: how to find the fixed point; default `Broyden()`.
      gradient: how to differentiate it; default `Implicit()`.
      max_steps: a tighter limit on evaluations for this call; may be traced, so that it can change without recompiling.
      probe: `backward_probe()`, when statistics of the adjoint solve are wanted.
      on_failure: what the gradient of a member that did not converge is. 'return': the gradient at its best iterate. 'nan':
        NaN, to be seen at once. 'zero_gradient': its cotangent becomes zero, so that it contributes nothing to what the
        members share; only a member whose f is not finite at z0 itself still does, since 0 times NaN is NaN.
      batched: False when the leaves of z0 have no batch axis: one problem. f then sees them as they are, and the arrays of
        the statistics have no batch axis either.

    Returns:
      `Solution(value, stats, trajectory)`. Not converging is not an error: see `stats.converged`. The trajectory is there
      when the solver has `sample_steps`: each iterate has the gradient of one evaluation of f at it, held constant (the
      inexact gradient of Bai et al. 2022, which introduced the correction loss: `fixed_point_correction_loss`).

    On a sharded batch, call it inside `jax.shard_map(..., check_vma=False)`: each shard then stops by itself, and the loop
    holds no collective.

    Raises:
      TypeError: solver is not a `Solver`.
      ValueError: z0 is not such a pytree, f returns something unlike z, or on_failure is unknown. Nothing has been solved then.
    """
    solver = Broyden() if solver is None else solver
    if isinstance(solver, GMRES):
        raise TypeError("GMRES solves linear equations only: use it for the adjoint, gradient=Implicit(solver=GMRES(...))")
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver such as Broyden(), not {solver!r}")
    if on_failure not in ON_FAILURE:
        raise ValueError(f"unknown on_failure {on_failure!r}; known: {', '.join(ON_FAILURE)}")
    z0 = jax.tree.map(jnp.asarray, z0)
    if not batched:
        z0 = jax.tree.map(lambda leaf: leaf[None], z0)
    check_state(z0)

    def map_(z: Any) -> Any:
        if batched:
            return f(z, *args)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], f(jax.tree.map(lambda leaf: leaf[0], z), *args))

    check_map(map_, z0)
    gradient = Implicit() if gradient is None else gradient
    solution = gradient(map_, jax.lax.stop_gradient(z0), solver, max_steps, probe)
    solution = _with_trajectory(map_, z0, solution)
    if on_failure != "return":
        solution = _gate(solution, on_failure)
    return solution if batched else _without_batch(solution)


def _with_trajectory(f: Map, z0: Any, solution: Solution) -> Solution:
    """The flat iterates that the loop recorded as a pytree, each with the gradient of one evaluation at it."""
    flat = solution.stats.sampled
    if flat is None:
        return solution
    flatten, unflatten = flattener(z0)

    def one(x: jax.Array) -> Any:
        return unflatten(attach(x, flatten(f(unflatten(x)))))

    trajectory = jax.vmap(one)(jax.lax.stop_gradient(flat))
    return replace(solution, trajectory=trajectory, stats=replace(solution.stats, sampled=None))


def _gate(solution: Solution, on_failure: OnFailure) -> Solution:
    """The same values, with the gradient of the members that did not converge replaced."""
    failed = solution.stats.converged == 0

    def gate(leaf: jax.Array) -> jax.Array:
        here = jnp.reshape(failed, (-1,) + (1,) * (leaf.ndim - 1))
        if on_failure == "zero_gradient":
            return jnp.where(here, jax.lax.stop_gradient(leaf), leaf)
        return attach(jax.lax.stop_gradient(leaf), leaf * jnp.where(here, jnp.nan, 1.0).astype(leaf.dtype))

    return replace(solution, value=jax.tree.map(gate, solution.value))


def _without_batch(solution: Solution) -> Solution:
    stats = solution.stats
    per_member = {name: None if x is None else x[0] for name, x in vars(stats).items() if name not in ("nfe", "sampled")}
    return Solution(
        value=jax.tree.map(lambda leaf: leaf[0], solution.value),
        stats=replace(stats, **per_member),
        trajectory=jax.tree.map(lambda leaf: leaf[:, 0], solution.trajectory),
    )
