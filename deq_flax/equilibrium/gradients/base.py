"""What the gradients share."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from deq_flax.equilibrium.loop import solve
from deq_flax.equilibrium.solution import Solution, Solver
from deq_flax.equilibrium.state import flattener

Map = Callable[[Any], Any]
Flat = Callable[[jax.Array], jax.Array]


class Gradient(Protocol):
    """See the package's head. `probe` is `backward_probe()` or None; a gradient without an adjoint solve leaves it zero."""

    def __call__(
        self,
        f: Map,
        z0: Any,
        solver: Solver,
        max_steps: jax.Array | int | None = None,
        probe: jax.Array | None = None,
    ) -> Solution: ...


def backward_probe() -> jax.Array:
    """Zeros (3,) to hand to `fixed_point(..., probe=)`: the gradient with respect to them is the adjoint solve's report.

    [evaluations of the vector-Jacobian product, largest relative residual of a member, number of adjoint solves]: sums over
    all solves that shared the probe, so that averages come out right under vmap, scan and gradient accumulation. Only
    `Implicit` solves an adjoint equation; the others leave zeros.
    """
    return jnp.zeros(3)


def flat_map(f: Map, z0: Any) -> tuple[Flat, jax.Array, Callable[[jax.Array], Any]]:
    """f as a function of flat states (B, N), z0 as such a state, and the way back."""
    flatten, unflatten = flattener(z0)
    return lambda x: flatten(f(unflatten(x))), flatten(z0), unflatten


def stopped(f: Flat) -> Flat:
    """f without a gradient: a loop over it is not differentiated, whatever f closes over."""
    return lambda x: jax.lax.stop_gradient(f(x))


def closed_over(f: Flat, x: jax.Array) -> tuple[Callable[[jax.Array, list[Any], list[Any]], jax.Array], list[Any], list[Any]]:
    """f as a function of what it closes over too: pure_f(x, floating, others), and the traced values it closes over.

    For `jax.custom_vjp`, which differentiates arguments only. `floating` may need a gradient; `others`, integers and random
    keys, cannot have one, but must be arguments all the same: vmap and scan may have traced them.
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
    """The value, bit for bit, with the gradient of the surrogate, in every mode of differentiation."""
    return value


@attach.defjvp
def _attach_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]


def truncated_series(
    f: Map, z0: Any, solver: Solver, max_steps: jax.Array | int | None, *, terms: int, damping: float
) -> Solution:
    """Solve, and differentiate with (I - J)^{-1} replaced by d sum_{i<terms} (d J + (1 - d) I)^i, d = damping, at z*.

    In forward mode the sum is applied to (df/dtheta) dtheta, in reverse mode its transpose to the cotangent.
    """
    flat_f, x0, unflatten = flat_map(f, z0)

    def tangent(minus: Flat, b: jax.Array) -> jax.Array:
        # minus(x) = (J - I) x, and x with minus(x) = b is wanted. Horner's scheme: x <- first + (d J + (1 - d) I) x.
        first = -damping * b
        return jax.lax.fori_loop(1, terms, lambda _, x: first + x + damping * minus(x), first)

    x, stats = jax.lax.custom_root(
        lambda x: flat_f(x) - x, x0, lambda _, x: solve(flat_f, x, solver, max_steps), tangent, has_aux=True
    )
    return Solution(value=unflatten(x), stats=jax.lax.stop_gradient(stats))
