"""The protocol of gradients, and the building blocks that several of them share."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from deq_flax.equilibrium.loop import Solver
from deq_flax.equilibrium.solution import FlatMap, SolverStats


class Gradient(Protocol):
    """A way to solve x = f(x) on flat states such that the result is differentiable in what f closes over."""

    def __call__(
        self,
        f: FlatMap,
        x0: jax.Array,
        solver: Solver,
        max_steps: jax.Array | int | None,
        probe: jax.Array | None,
    ) -> tuple[jax.Array, SolverStats]:
        """Return x, (B, N), differentiable, and statistics.

        Args:
          f: (B, N) -> (B, N), each sample by itself.
          x0: (B, N) initial guess, without gradient.
          solver: forward solver.
          max_steps: lower limit on evaluations for this call, or None.
          probe: `backward_probe()` or None; gradients without an adjoint solve leave it zero.
        """
        ...


def stopped(f: FlatMap) -> FlatMap:
    """Return f without a gradient: a loop over it is not differentiated, whatever f closes over."""
    return lambda x: jax.lax.stop_gradient(f(x))


def closed_over(
    f: FlatMap, x: jax.Array
) -> tuple[Callable[[jax.Array, list[Any], list[Any]], jax.Array], list[Any], list[Any]]:
    """Return (pure_f, floating, others): pure_f(x, floating, others) is f(x), with its traced closure as arguments.

    `jax.custom_vjp` differentiates arguments only. `floating` may need a gradient; `others`, integers and random keys, cannot
    have one, but must be arguments too, since vmap and scan may have traced them. `jax.closure_convert` does not
    separate the two.
    """
    closed = jax.make_jaxpr(f)(x)

    def kind(value: Any) -> str:
        if not isinstance(value, Tracer):
            return "constant"
        return "floating" if jnp.issubdtype(value.dtype, jnp.inexact) else "other"

    kinds = [kind(value) for value in closed.consts]
    groups = {
        k: [v for v, own in zip(closed.consts, kinds, strict=True) if own == k] for k in ("constant", "floating", "other")
    }

    def pure_f(x: jax.Array, floating: list[Any], others: list[Any]) -> jax.Array:
        source = {"constant": iter(groups["constant"]), "floating": iter(floating), "other": iter(others)}
        (out,) = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, [next(source[k]) for k in kinds]))(x)
        return out

    return pure_f, groups["floating"], groups["other"]


@jax.custom_jvp
def attach(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """Return the value, bit for bit, with the derivatives of the surrogate, of any order and in every mode; value has none."""
    return value


@attach.defjvp
def _attach_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Not the bare value: a further level of differentiation looks at what this returns, and must see the surrogate again.
    return attach(*primals), tangents[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def underivable(value: Any, message: str) -> Any:
    """Return the value, a pytree whose derivatives, in any mode, raise NotImplementedError with this message."""
    return value


@underivable.defjvp
def _refuse(message: str, primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(message)
