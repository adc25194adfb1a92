"""`fixed_point_queue`: many problems through a few slots of a batch, so that hard problems do not hold up easy ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.fixed_point import check_map, check_max_steps, check_solver, flat_map, flattener
from deq_flax.equilibrium.gradients.base import underivable
from deq_flax.equilibrium.loop import Solver, check_number, iteration, never_frozen, select_samples, statistics
from deq_flax.equilibrium.shards import cast, varying
from deq_flax.equilibrium.solution import Solution, SolverStats
from deq_flax.equilibrium.solvers.broyden import Broyden

NO_DERIVATIVES = "fixed_point_queue has no derivatives: use fixed_point, or jax.lax.stop_gradient(f(...)) as its f"


def fixed_point_queue(
    f: Callable[..., Any],
    z0: Any,
    *inputs: Any,
    slots: int,
    solver: Solver | None = None,
    max_steps: jax.Array | int | None = None,
) -> Solution:
    """Solve P problems z = f(z, *inputs), each a row of z0 and inputs, in a batch of few slots: continuous batching.

    A batch is as slow as its hardest problem. Here a problem that has stopped hands its slot to the next one, so that the
    evaluations of f come near the mean of the steps, not near the mean of the batches' largest. Each problem takes the steps it
    would take alone. In return every evaluation costs a little more, and evaluations near the end are not full.

    >>> W = 0.3 * jax.random.normal(jax.random.key(0), (8, 8)) / 8**0.5
    >>> x = jnp.linspace(0, 3, 1000)[:, None] * jnp.ones((1, 8))
    >>> sol = fixed_point_queue(lambda z, x: jnp.tanh(z @ W + x), jnp.zeros_like(x), x, slots=32)
    >>> sol.value.shape, bool(sol.stats.converged.all())
    ((1000, 8), True)

    It is for inference: derivatives in what f depends on raise NotImplementedError, in forward and in reverse mode. A queue
    within a function that is differentiated is a constant of it with `lambda *row: jax.lax.stop_gradient(f(*row))` as its f.

    Args:
      f: called as f(z, *inputs) with `slots` rows of each; treats each row by itself. What all problems share, such as
        parameters, it closes over.
      z0: initial guesses: a pytree of real floating arrays (P, ...). They get no gradient.
      *inputs: pytrees of arrays (P, ...).
      slots: size of the batch, at least 1. The more it is below P, the fuller the evaluations.
      solver: default `Broyden()`. It may not record a trajectory.
      max_steps: lower limit on the evaluations for each problem; may be traced.

    Returns:
      `Solution` with value and statistics of all problems, in order; `stats.nfe` counts the evaluations of f on the slots.

    Raises:
      NotImplementedError: the solution is differentiated.
      TypeError: solver is not a `Solver`, or slots or max_steps no whole number.
      ValueError: slots is less than 1, a leaf of inputs has not P rows, the solver records a trajectory, or for the reasons of
        `fixed_point`.
    """
    solver = Broyden() if solver is None else solver
    check_solver(solver)
    check_max_steps(max_steps, solver.max_steps)
    check_number("fixed_point_queue: slots", slots, "[1, inf)", whole=True)
    if solver.trajectory_steps:
        raise ValueError("fixed_point_queue needs a solver without trajectory_steps")
    z0, inputs = jax.tree.map(jnp.asarray, (z0, inputs))
    flatten, unflatten_all = flattener(z0)
    x0 = jax.lax.stop_gradient(flatten(z0))
    problems = len(x0)
    slots = min(slots, problems)
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
        if leaf.shape[:1] != (problems,):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"inputs{name} has shape {list(leaf.shape)}: its leading axis must be that of z0, {problems}")

    def rows(tree: Any, index: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], tree)

    first = jnp.arange(slots)
    _, unflatten = flattener(rows(z0, first))
    shapes = check_map(lambda z: f(z, *rows(inputs, first)), rows(z0, first), solver)
    loop = iteration(solver, max_steps, freeze=never_frozen)

    def begin(index: jax.Array) -> tuple[Any, Any]:
        """Loops at their start, and the inputs, of the problems with these numbers."""
        return jax.vmap(loop.start)(x0[index][:, None]), rows(inputs, index)

    def exchange(s: _Queue, done: jax.Array) -> _Queue:
        """Take the answers out of these slots, and put the next problems into them."""
        results = jax.vmap(lambda end: _result(end, solver))(s.loops)
        place = jnp.where(done, s.problem, problems)
        answers = jax.tree.map(lambda all_, new: all_.at[place].set(new, mode="drop"), s.answers, results)
        problem = jnp.where(done, jnp.minimum(s.next + jnp.cumsum(done, dtype=jnp.int32) - 1, problems), s.problem)
        new = begin(jnp.minimum(problem, problems - 1))
        loops, at = select_samples(done, new, (s.loops, s.inputs))
        return s._replace(
            next=s.next + jnp.sum(done, dtype=jnp.int32), problem=problem, loops=loops, inputs=at, answers=answers
        )

    def body(s: _Queue) -> _Queue:
        fz = flat_map(lambda z: f(z, *s.inputs), flatten, unflatten)(s.loops.z[:, 0])
        loops = jax.vmap(loop.advance)(s.loops, fz[:, None])
        done = ~jax.vmap(loop.keep_going)(loops) & (s.problem < problems)
        s = s._replace(evaluations=s.evaluations + 1, loops=loops)
        return jax.lax.cond(jnp.any(done), exchange, lambda s, done: s, s, done)

    loops, at = begin(first)
    blank = jax.eval_shape(lambda loops: jax.vmap(lambda end: _result(end, solver))(loops), loops)
    start = _Queue(
        evaluations=jnp.zeros((), jnp.int32),
        next=jnp.full((), slots, jnp.int32),
        problem=first.astype(jnp.int32),
        loops=loops,
        inputs=at,
        answers=jax.tree.map(lambda leaf: jnp.zeros((problems, *leaf.shape[1:]), leaf.dtype), blank),
    )
    start = cast(start, varying((z0, inputs, shapes)))
    end = jax.lax.while_loop(lambda s: jnp.any(s.problem < problems), body, start)
    x, statistics_of_each = underivable(end.answers, NO_DERIVATIVES)
    nfe = end.evaluations.astype(x.dtype)
    return Solution(value=unflatten_all(x), stats=SolverStats(**statistics_of_each, nfe=nfe))


class _Queue(NamedTuple):
    evaluations: jax.Array
    next: jax.Array
    """The first problem that no slot has taken yet."""
    problem: jax.Array
    """(B,) int32: the problem in each slot; P where none is left."""
    loops: Any
    """A loop of one sample for each slot, with a leading axis (B,)."""
    inputs: Any
    """The inputs of the problems in the slots."""
    answers: Any
    """Results of all problems, (P, ...); zeros until a problem has stopped."""


def _result(end: Any, solver: Solver) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the iterate (N,) and the statistics of a loop of one sample."""
    stats = vars(statistics(end, solver))
    return end.best.z[0], {name: x[0] for name, x in stats.items() if x is not None and name != "nfe"}
