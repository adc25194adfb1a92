"""Scales: neither solvers nor gradients depend on those of the state and the loss, from 1e-30 to 1e30 in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import (
    GMRES,
    SHINE,
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    PhantomGradient,
    Picard,
    Reversible,
    Unroll,
    fixed_point,
)
from deq_flax.equilibrium.solution import norm
from tests.cases import others_slow
from tests.equilibrium.dense import adjoint, cell, loss, problem

GRADIENTS = [
    Implicit(),
    PhantomGradient(),
    SHINE(),
    Reversible(),
    Implicit(Anderson(max_steps=80)),
    Implicit(GMRES(restart=4)),
    Implicit(Picard()),
    Implicit(Broyden(line_search=True)),
    Neumann(),
    SHINE(refine_steps=9),
    Unroll(20),
]
SCALES = np.float32([1.0, 1e-30, 1e-4, 1e4, 1e30])


@functools.partial(jax.jit, static_argnames=("solver", "gradient"))
def slopes(w, x, scales, solver, gradient):
    """Return the gradients of scale times the loss, for each scale, and the equilibria."""

    def total(w, x, scale):
        sol = fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=gradient)
        return scale * loss(sol.value), sol.value

    return jax.vmap(jax.grad(total, argnums=(0, 1), has_aux=True), (None, None, 0))(w, x, scales)


@pytest.mark.parametrize("gradient", others_slow(GRADIENTS, GRADIENTS[:1]), ids=repr)
def test_gradient_is_invariant_to_the_scale_of_the_loss(gradient):
    """In float32, where the square of a number below 1e-19 or above 1e19 is none; the forward tolerance is absolute."""
    w, x, _ = problem()
    (dw, dx), z = jax.device_get(slopes(w, x, SCALES, Broyden(tol=1e-5, stop="absolute"), gradient))
    for slope in (dw, dx):
        unit = slope / SCALES[:, None, None]
        error = np.linalg.norm(unit - unit[0], axis=(1, 2)) / np.linalg.norm(unit[0])
        assert error.max() < 1e-5, error
    if isinstance(gradient, Implicit):
        exact = adjoint(w, x, z[0], lambda j, v: np.linalg.solve(np.eye(6) - j.T, v))[1]
        np.testing.assert_allclose(dx / SCALES[:, None, None], np.broadcast_to(exact, dx.shape), rtol=2e-3, atol=1e-4)


SOLVERS = [
    Picard(relaxation=0.7),
    Anderson(),
    Broyden(),
    Picard(adaptive=True),
    Anderson(memory=5, restart=True),
    Broyden(line_search=True),
]


@functools.partial(jax.jit, static_argnames="solver")
def scaled(w, x, scales, solver):
    """Solve the problem in units of each scale, and differentiate with respect to x."""

    def solve(x):
        f = lambda z: scales[:, None] * cell(z / scales[:, None], w, x)  # noqa: E731
        sol = fixed_point(f, jnp.zeros_like(x), solver=solver)
        return jnp.sum(sol.value), sol

    return jax.grad(solve, has_aux=True)(x)


@pytest.mark.parametrize("solver", others_slow(SOLVERS, SOLVERS[:3]), ids=repr)
def test_a_state_of_any_scale_is_solved_alike(solver):
    """The batch holds one problem in several units. Units are powers of two, so that nothing at all may differ.

    Below 2**-90, differences of small entries leave the range of normal numbers.
    """
    scales = np.float32(2.0) ** np.float32([0, -90, -60, 60, 100])
    w, x, _ = problem(batch=1)
    slope, sol = jax.device_get(scaled(w, np.repeat(x, len(scales), axis=0), scales, solver))
    assert sol.stats.converged.all()
    for array in (sol.stats.steps, sol.stats.relative_residual, sol.stats.absolute_residual / scales):
        np.testing.assert_array_equal(array, np.full_like(array, array[0]))
    for array in (sol.value / scales[:, None], slope / scales[:, None]):
        np.testing.assert_array_equal(array, np.broadcast_to(array[0], array.shape))


@pytest.mark.parametrize("solver", SOLVERS[2:], ids=repr)
def test_away_from_the_scale_of_the_start_nothing_is_claimed_falsely(solver):
    """From 1e-30, next to the unstable solution 0 of z = tanh(2 z), and from 1e30, where tanh is flat."""
    start = np.repeat(np.float32([[1e-30], [1e30], [-1e-25]]), 4, axis=1) * np.float32([1, 2, 3, 4])
    sol = jax.device_get(jax.jit(lambda z: fixed_point(lambda z: jnp.tanh(2 * z), z, solver=solver))(start))
    z = sol.value.astype(float)
    fz = np.tanh(2 * z)
    floor = np.finfo(np.float32).eps * np.linalg.norm(np.minimum(abs(start), abs(np.tanh(2 * start))).astype(float), axis=1)
    residual = np.linalg.norm(fz - z, axis=1) / np.maximum(np.linalg.norm(fz, axis=1), floor)
    np.testing.assert_allclose(sol.stats.relative_residual, residual, rtol=1e-2, atol=5e-7)
    np.testing.assert_array_equal(sol.stats.converged == 1, sol.stats.relative_residual <= solver.tol)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_one_huge_evaluation_makes_nothing_converge(solver):
    """z = exp(-z) from -20 to -30: f(z0) is up to 1e13, and its rounding error larger than the solution."""
    start = np.linspace(-30, -20, 5, dtype=np.float32)[:, None]
    sol = jax.device_get(jax.jit(lambda z: fixed_point(lambda z: jnp.exp(-z), z, solver=solver))(start))
    fz = np.exp(-sol.value.astype(float))
    assert sol.stats.converged.all() and (abs(fz - sol.value) <= 2e-6 * fz).all()


@pytest.mark.parametrize("far", [1e10, 1e20, 1e30])
def test_anderson_goes_on_when_residuals_have_fallen_below_the_range_of_the_first(far):
    w, x, _ = problem(batch=2)
    stats = jax.jit(lambda z: fixed_point(lambda z: cell(z, w, x), z, solver=Anderson()).stats)(np.full_like(x, far))
    assert stats.converged.all()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_gmres_alone_and_norms_are_right_at_any_scale(scale):
    rng = np.random.default_rng(0)
    j, b = (0.6 * rng.normal(size=(2, 6, 6)) / 6**0.5).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32)
    run = jax.jit(lambda b: GMRES().solve_linear(lambda x: jnp.einsum("bij,bj->bi", j, x), b))
    (x, stats), (y, expected) = jax.device_get((run(np.float32(scale) * b), run(b)))
    assert expected.converged.all()
    np.testing.assert_array_equal(stats.steps, expected.steps)
    np.testing.assert_allclose(x / np.float32(scale), y, rtol=1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(scale * b, jnp.float32)), scale * np.linalg.norm(b, axis=1), rtol=1e-6)
