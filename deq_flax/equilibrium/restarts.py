"""`fixed_point_restarts`: each problem from several initial guesses, in one batch; and whether their answers agree.

K starts, B samples.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.fixed_point import check_gradient, check_solver, fixed_point, flattener
from deq_flax.equilibrium.gradients import SHINE, Gradient, Implicit, Reversible, Unroll
from deq_flax.equilibrium.loop import Solver
from deq_flax.equilibrium.solution import Solution, norm, over_samples
from deq_flax.equilibrium.solvers.broyden import Broyden


def fixed_point_restarts(
    f: Callable[..., Any],
    starts: Any,
    *inputs: Any,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    max_steps: jax.Array | int | None = None,
) -> tuple[Solution, Solution]:
    """Solve z = f(z, *inputs) from K initial guesses each, and choose the answer of the lowest residual.

    All starts are one batch of K x B samples, which stop one by one; what one finds does not depend on the others. The loop
    takes as many evaluations as the hardest of them. The chosen answer alone is differentiated, which costs what it does from
    one start, and one more evaluation of f on B rows, which `stats.nfe` does not count.

    >>> W = 3.0 * jax.random.normal(jax.random.key(0), (8, 8)) / 8**0.5
    >>> x, starts = jnp.ones((2, 8)), jax.random.normal(jax.random.key(1), (16, 2, 8))
    >>> best, every = fixed_point_restarts(lambda z, x: jnp.tanh(z @ W + x), starts, x)
    >>> best.value.shape, every.value.shape, path_independence(every.value).shape
    ((2, 8), (16, 2, 8), (2,))

    Args:
      f: called as f(z, *inputs) with K x B or B rows of each; treats each row by itself. What all samples share, such as
        parameters, it closes over. An f that couples what it gets is one problem: in `jax.vmap(f)` each start is a sample.
      starts: initial guesses: a pytree of real floating arrays (K, B, ...). Of answers with equal residuals the first counts.
      *inputs: pytrees of arrays (B, ...), the same for every start.
      solver, gradient, max_steps: as for `fixed_point`. The solver may not record a trajectory, and the gradient must be one at
        the answer, such as `Implicit`, not one along the path to it.

    Returns:
      The chosen `Solution`, leaves of value and statistics (B, ...), and that of all starts, (K, B, ...), which carries no
      gradient. The residual is the one that the solver stops by. A start whose evaluation was not finite is chosen only if all
      were.

    Raises:
      TypeError: solver is not a `Solver`, or gradient no gradient.
      ValueError: the leaves of starts do not share two leading axes, of which the first is not empty, or those of inputs do not
        have the second; the solver records a trajectory; the gradient is `Unroll`, `Reversible` or `SHINE`; or for the reasons
        of `fixed_point`.
    """
    solver = Broyden() if solver is None else solver
    gradient = Implicit() if gradient is None else gradient
    check_solver(solver)
    check_gradient(gradient, "return")
    if solver.trajectory_steps:
        raise ValueError("fixed_point_restarts needs a solver without trajectory_steps")
    if isinstance(gradient, Unroll | Reversible | SHINE):
        name = type(gradient).__name__
        raise ValueError(f"{name} differentiates the path from one start: take a gradient at the answer, such as Implicit()")
    starts, inputs = jax.tree.map(jnp.asarray, (starts, inputs))
    count, batch = _leading("starts", starts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if leaf.shape[:1] != (batch,):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"inputs{name} has shape {list(leaf.shape)}: its leading axis must be the second of starts, {batch}"
            )

    def for_each_start(leaf: jax.Array) -> jax.Array:
        return _fold(jnp.broadcast_to(leaf[None], (count, *leaf.shape)))

    every = fixed_point(
        lambda *operands: jax.lax.stop_gradient(f(*operands)),
        jax.tree.map(_fold, starts),
        *jax.tree.map(for_each_start, inputs),
        solver=solver,
        max_steps=max_steps,
    )
    every = over_samples(lambda leaf: jnp.reshape(leaf, (count, batch, *leaf.shape[1:])), jax.lax.stop_gradient(every))
    stats = every.stats
    start = best_start(stats.relative_residual if solver.stop == "relative" else stats.absolute_residual)
    best = over_samples(lambda leaf: leaf[start, jnp.arange(batch)], every)
    # A solve of one evaluation returns where it starts.
    answer = fixed_point(f, best.value, *inputs, solver=solver, gradient=gradient, max_steps=1)
    return replace(best, value=answer.value), every


def best_start(residuals: jax.Array) -> jax.Array:
    """Return the start of the lowest residual, (K, B) -> (B,) int32; one that is not finite is above all others."""
    return jnp.argmin(jnp.where(jnp.isfinite(residuals), residuals, jnp.inf), axis=0)


def path_independence(answers: Any) -> jax.Array:
    """Return the mean cosine similarity of the answers of two different starts, (B,): 1 where all starts lead to one state.

    That is the asymptotic alignment of Anil et al. 2022, who start from zero and from the solution of another sample, and find
    that models whose answers agree gain from more iterations at test time. Look at the residuals beside it: answers that are no
    fixed points may agree. At a small relative distance d two states have a similarity of 1 - d^2 / 2 at least; one of zero
    has no direction and is like no other.

    Args:
      answers: a pytree of real floating arrays (K, B, ...) for K >= 2 starts, such as the value of `fixed_point_restarts`.

    Raises:
      ValueError: the leaves do not share two leading axes, or K is 1.
    """
    answers = jax.tree.map(jnp.asarray, answers)
    count, batch = _leading("answers", answers)
    if count < 2:
        raise ValueError("path_independence compares the answers of at least 2 starts, not of 1")
    folded = jax.tree.map(_fold, answers)
    flat = flattener(folded)[0](folded)
    size = norm(flat)[:, None]
    unit = jnp.where(size > 0, flat / jnp.where(size > 0, size, 1.0), 0.0).reshape(count, batch, -1)
    squares = jnp.sum(jnp.square(jnp.sum(unit, axis=0)), axis=1) - jnp.sum(jnp.square(unit), axis=(0, 2))
    return squares / (count * (count - 1))


def _leading(name: str, tree: Any) -> tuple[int, int]:
    """Return K and B, the two leading axes that all leaves share."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = {leaf.shape[:2] for _, leaf in leaves}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or shape[0] < 1:
        found = ", ".join(f"{name}{jax.tree_util.keystr(path)} {list(leaf.shape)}" for path, leaf in leaves)
        raise ValueError(f"{name} must be arrays with the same two leading axes, starts and samples, not {found or 'empty'}")
    return shape[0], shape[1]


def _fold(leaf: jax.Array) -> jax.Array:
    return jnp.reshape(leaf, (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]))
