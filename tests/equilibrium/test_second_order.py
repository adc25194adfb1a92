"""Derivatives of derivatives: each gradient against the function that it differentiates, in closed form, in every nesting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import SHINE, Anderson, Broyden, Implicit, PhantomGradient, Picard, Reversible, Unroll, fixed_point
from deq_flax.equilibrium.loop import solve_with_state
from deq_flax.equilibrium.solvers.broyden import apply_inverse_transpose
from tests.cases import others_slow
from tests.equilibrium.dense import TIGHT, cell, loss, problem

LOOSE = Broyden(tol=1e-4)


def total(x, gradient, solver=LOOSE, on_failure="return"):
    w = jnp.asarray(problem()[0])
    return loss(fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=gradient, on_failure=on_failure).value)


def shifted(at, moving):
    """Return `at` plus the change of moving(x) from its present value: what a gradient differentiates, as a function."""
    return jax.lax.stop_gradient(at) + moving - jax.lax.stop_gradient(moving)


def solved(f, x, solver=LOOSE):
    """Return the solution z of z = f(z), a constant, and the function v -> -H v of Broyden's inverse at its end."""
    z, _, state = jax.lax.stop_gradient(solve_with_state(f, jnp.zeros_like(x), solver))
    rows = [apply_inverse_transpose(state, jnp.broadcast_to(e, x.shape)) for e in jnp.eye(x.shape[1], dtype=x.dtype)]
    return z, lambda v: -jnp.einsum("ebn,bn->be", jnp.stack(rows), v)


def phantom(x):
    w = jnp.asarray(problem()[0])
    z, _ = solved(lambda z: cell(z, w, jax.lax.stop_gradient(x)), x)
    y = z
    for _ in range(3):
        y = 0.5 * y + 0.5 * cell(y, w, x)
    return loss(shifted(z, y))


def shine(x):
    w = jnp.asarray(problem()[0])
    z, apply = solved(lambda z: cell(z, w, jax.lax.stop_gradient(x)), x)
    return loss(shifted(z, apply(cell(z, w, x))))


def half(y, z, x):
    return 0.5 * jnp.tanh(y @ jnp.asarray(problem()[0]) + z + x)


def inner(z, x):
    return fixed_point(half, jnp.zeros_like(x), z, x, solver=LOOSE, gradient=SHINE(fallback=None)).value


def shine_in_shine(x):
    f = lambda z, x: cell(inner(z, x), jnp.asarray(problem()[0]), x)  # noqa: E731
    return loss(fixed_point(f, jnp.zeros_like(x), x, solver=LOOSE, gradient=SHINE(fallback=None)).value)


def shine_in_shine_by_hand(x):
    w, constant = jnp.asarray(problem()[0]), jax.lax.stop_gradient(x)
    z, outer_apply = solved(lambda z: cell(inner(z, constant), w, constant), x)
    y, inner_apply = solved(lambda y: half(y, z, constant), x)
    return loss(shifted(z, outer_apply(cell(shifted(y, inner_apply(half(y, z, x))), w, x))))


def trajectory(x):
    solver = Anderson(trajectory_steps=(2,))
    return loss(fixed_point(cell, jnp.zeros_like(x), jnp.asarray(problem()[0]), x, solver=solver).trajectory[0])


def trajectory_by_hand(x):
    w = jnp.asarray(problem()[0])
    at = jax.lax.stop_gradient(fixed_point(cell, 0 * x, w, x, solver=Anderson(trajectory_steps=(2,))).trajectory[0])
    return loss(shifted(at, cell(at, w, x)))


exact = functools.partial(total, gradient=Unroll(150))
CASES = {
    "nan": (functools.partial(total, gradient=Implicit(), solver=TIGHT, on_failure="nan"), exact),
    "phantom": (functools.partial(total, gradient=PhantomGradient(3)), phantom),
    "shine": (functools.partial(total, gradient=SHINE(fallback=None)), shine),
    "shine in shine": (shine_in_shine, shine_in_shine_by_hand),
    "trajectory": (trajectory, trajectory_by_hand),
}


@pytest.mark.parametrize(
    "case",
    others_slow(CASES, CASES.keys() - {"shine in shine", "trajectory", "phantom"}),
)
def test_every_nesting_is_that_of_the_function_in_closed_form(case):
    """Reverse over reverse, through the value and the gradient; forward over reverse; reverse over forward."""
    ours, by_hand = CASES[case]

    def both(x):
        value, slope = jax.value_and_grad(ours)(x)
        return value**2 + jnp.vdot(slope, slope)

    def closed(x):
        value, slope = jax.value_and_grad(by_hand)(x)
        return slope, (value, slope)

    with jax.enable_x64(True):
        _, x, v = problem(batch=1)
        hessian, (value, slope) = jax.device_get(jax.jit(jax.jacfwd(closed, has_aux=True))(x))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)
        close(jax.jit(jax.grad(both))(x), 2 * value * slope + 2 * np.einsum("abcd,cd->ab", hessian, slope))
        if "shine" not in case:  # which has reverse mode alone
            close(jax.jit(lambda x: jax.jvp(jax.grad(ours), (x,), (v,))[1])(x), np.einsum("abcd,cd->ab", hessian, v))
        if case == "phantom":
            slope_along_v = jax.jit(jax.grad(lambda x: jax.jvp(ours, (x,), (v,))[1]))
            close(slope_along_v(x), np.einsum("abcd,cd->ab", hessian, v))


REFUSED = {
    "SHINE, jvp of grad": (SHINE(), lambda f, x: jax.jvp(jax.grad(f), (x,), (x,)), TypeError, "forward-mode"),
    "SHINE, refined": (SHINE(3), lambda f, x: jax.grad(lambda x: jax.grad(f)(x).sum())(x), NotImplementedError, "refine_steps"),
    "Reversible": (Reversible(), lambda f, x: jax.grad(lambda x: jax.value_and_grad(f)(x)[0])(x), ValueError, "while_loop"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_nesting_that_is_not_offered_is_refused(case):
    gradient, differentiate, error, message = REFUSED[case]
    solver = LOOSE if isinstance(gradient, SHINE) else Picard(max_steps=9)
    f = lambda x: total(x, gradient, solver)  # noqa: E731
    with pytest.raises(error, match=message):
        jax.jit(lambda x: differentiate(f, x)).lower(problem(batch=1)[1])
