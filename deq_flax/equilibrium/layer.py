"""`Equilibrium`: the fixed point of a cell, as an NNX module."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from deq_flax.equilibrium.fixed_point import OnFailure, check_arguments, fixed_point
from deq_flax.equilibrium.gradients import Gradient, Implicit
from deq_flax.equilibrium.loop import Solver
from deq_flax.equilibrium.solution import Solution
from deq_flax.equilibrium.solvers.broyden import Broyden


class Equilibrium(nnx.Module):
    """A layer whose output is z* = cell(z*, *inputs).

    >>> class Cell(nnx.Module):
    ...     def __init__(self, d, *, rngs):
    ...         self.linear = nnx.Linear(d, d, rngs=rngs)
    ...     def __call__(self, z, x):
    ...         return jax.numpy.tanh(0.5 * self.linear(z) + x)
    >>> layer = Equilibrium(Cell(8, rngs=nnx.Rngs(0)))
    >>> layer(jax.numpy.zeros((2, 8)), jax.numpy.ones((2, 8))).value.shape
    (2, 8)

    Random streams of the cell (dropout) are frozen during a solve, so that every evaluation draws the same mask and a fixed
    point exists; they advance once per call. Other state that the cell writes, such as running statistics, is read but not
    updated: keep such layers outside the cell.

    Args:
      cell: called as cell(z, *inputs, **named); returns a pytree like z, or a pair (z, aux) with `has_aux`.
      solver, gradient, on_failure, batched, has_aux: as for `fixed_point`.

    Raises:
      TypeError, ValueError: solver, gradient or on_failure is not what `fixed_point` takes.
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        on_failure: OnFailure = "return",
        batched: bool = True,
        has_aux: bool = False,
    ):
        self.cell = cell
        self.solver = Broyden() if solver is None else solver
        self.gradient = Implicit() if gradient is None else gradient
        check_arguments(self.solver, self.gradient, on_failure)
        self.on_failure: OnFailure = on_failure
        self.batched = batched
        self.has_aux = has_aux

    def __call__(
        self, z0: Any, *inputs: Any, max_steps: jax.Array | int | None = None, probe: jax.Array | None = None, **named: Any
    ) -> Solution:
        """Solve from z0, a pytree with leading batch axes unless `batched` is False; see `fixed_point`.

        The cell gets `inputs` and `named` as they are, arrays or not; all that is traced in them is differentiated.
        """
        graphdef, streams, state = nnx.split(self.cell, nnx.RngState, ...)

        def f(z: Any) -> Any:
            # A copy, because the streams may not be advanced from inside the loop's own trace.
            return nnx.merge(graphdef, streams, state, copy=True)(z, *inputs, **named)

        solution = fixed_point(
            f,
            z0,
            solver=self.solver,
            gradient=self.gradient,
            max_steps=max_steps,
            probe=probe,
            on_failure=self.on_failure,
            batched=self.batched,
            has_aux=self.has_aux,
        )
        if jax.tree.leaves(streams):
            nnx.update(self.cell, _advanced(graphdef, streams, state, lambda cell: cell(z0, *inputs, **named)))
        return solution


def _advanced(graphdef: Any, streams: Any, state: Any, evaluate: Callable[[Any], Any]) -> Any:
    """Return the random streams after one evaluation of the cell. Under jit the evaluation itself is dead code."""

    @jax.jit
    def run(streams: Any, state: Any) -> Any:
        cell = nnx.merge(graphdef, streams, state, copy=True)
        evaluate(cell)
        return nnx.state(cell, nnx.RngState)

    return run(streams, state)
