"""f that couples the samples of a batch: what is reported is true of what is returned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import GMRES, SHINE, Anderson, Broyden, Implicit, Picard, backward_probe, fixed_point
from tests.cases import others_slow

RNG = np.random.default_rng(0)
W, X = RNG.normal(size=(5, 5)) / 5**0.5, RNG.normal(size=(6, 5))
FAR = np.where(np.arange(6) < 3, 0.0, 30.0)[:, None]  # half of the samples need a few steps more
LIMITS = [80, 25, 6]


def f(z, xp=jnp):
    """Each sample sees the mean of all."""
    return xp.tanh(0.5 * z @ W + X) + 0.4 * xp.mean(z, axis=0)[None] + FAR


def solved(batched, solvers):
    """Solve by all solvers in one program; the residuals are by numpy."""
    with jax.enable_x64(True):
        run = jax.jit(lambda z: [fixed_point(f, z, solver=solver, batched=batched) for solver in solvers])
        for solver, sol in zip(solvers, jax.device_get(run(np.zeros_like(X))), strict=True):
            fz, axis = f(sol.value, np), 1 if batched else None
            absolute = np.linalg.norm(fz - sol.value, axis=axis)
            yield solver, sol.stats, absolute, absolute / np.linalg.norm(fz, axis=axis)


@pytest.mark.parametrize("method", others_slow([Picard, Anderson, Broyden], [Picard]))
def test_as_one_problem_all_is_true_and_every_solver_converges(method):
    for solver, stats, absolute, relative in solved(False, [method(1e-8, n) for n in LIMITS]):
        np.testing.assert_allclose(stats.absolute_residual, absolute, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(stats.relative_residual, relative, rtol=1e-6, atol=1e-14)
        assert stats.converged == (relative <= solver.tol) == (solver.max_steps > 6)


def test_as_samples_converged_is_true():
    """25 steps of Picard's method end when some samples have stopped and the others have not: one evaluation more tells."""
    for solver, stats, absolute, relative in solved(
        True, [cls(1e-8, n) for cls in (Picard, Anderson, Broyden) for n in LIMITS]
    ):
        np.testing.assert_array_equal(stats.converged == 1, relative <= solver.tol)
        if isinstance(solver, Picard):
            np.testing.assert_allclose(stats.absolute_residual, absolute, rtol=1e-6, atol=1e-12)
            assert stats.converged.all() == (solver.max_steps == 80)
            assert stats.nfe == {80: 28, 25: 26, 6: 6}[solver.max_steps]


def test_samples_that_do_not_see_each_other_take_no_further_evaluation():
    calls = []

    def alone(z):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.linspace(0.1, 0.9, 4)[:, None] * z + 1

    stats = jax.jit(lambda z: fixed_point(alone, z, solver=Picard(max_steps=8)).stats)(jnp.zeros((4, 2)))
    jax.effects_barrier()
    assert 0 < stats.converged.sum() < 4 and stats.nfe == 8 == len(calls)


def test_rounding_is_no_coupling():
    """A change of 1e-12, as of sums whose order differs between evaluations, wakes no sample and takes no evaluation."""
    with jax.enable_x64(True):
        f = lambda z: jnp.linspace(0.1, 0.9, 4)[:, None] * z + 1 + 1e-12 * jnp.sum(z)  # noqa: E731
        run = jax.jit(lambda z: fixed_point(f, z, solver=Picard(max_steps=8)).stats)
        stats = jax.device_get(run(jnp.zeros((4, 2))))
    assert 0 < stats.converged.sum() < 4 and stats.nfe == 8


@pytest.mark.parametrize(("limit", "nan_below"), [(2, -9.0), (20, -1.0)], ids=["at the limit", "beside one that dies"])
def test_a_sample_that_stops_last_is_true_among_what_the_others_return(limit, nan_below):
    """Sample 0 solves its equation where sample 1 is at -3, an iterate that is not returned."""

    def pair(z):
        a, b = z[:1], z[1:]
        return jnp.concatenate([1 + a * (3 - b), jnp.where(b < nan_below, jnp.nan, 3 - 2 * b)])

    sol = jax.jit(lambda z: fixed_point(pair, z, solver=Picard(max_steps=limit)))(jnp.zeros((2, 1)))
    residual = abs(pair(sol.value) - sol.value)[:, 0]
    assert not (sol.stats.converged * residual).any() and (limit > 2 or sol.stats.nfe == 3)


LINEAR = 0.3 * np.eye(3) + 0.4 / 3
WEIGHTS = np.array([1.0, 100.0, 1e-3])
"""Of a loss: the cotangents of the samples differ by 1e5."""


@pytest.mark.parametrize("solver", [Picard(1e-8), Anderson(1e-8), Broyden(1e-8), GMRES(1e-8)], ids=lambda s: type(s).__name__)
def test_a_gradient_whose_adjoint_solve_has_converged_is_exact(solver):
    """As one that has not may be far from it, the report tells which; Picard's method converges."""

    def loss(x, probe):
        f = lambda z: jnp.asarray(LINEAR) @ z + x  # noqa: E731
        return jnp.asarray(WEIGHTS) @ fixed_point(f, jnp.zeros((3, 1)), gradient=Implicit(solver), probe=probe).value[:, 0]

    with jax.enable_x64(True):
        slope, report = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones((3, 1)), backward_probe()))
    exact = np.linalg.solve(np.eye(3) - LINEAR.T, WEIGHTS)
    error = np.linalg.norm(slope[:, 0] - exact) / np.linalg.norm(exact)
    assert error <= 1e-6 if report[1] <= 1e-8 else not isinstance(solver, Picard)


def test_a_refined_shared_inverse_is_that_of_the_whole():
    def loss(x):
        f = lambda z: jnp.asarray(LINEAR) @ z + x  # noqa: E731
        sol = fixed_point(f, jnp.zeros((3, 1)), solver=Broyden(1e-10), gradient=SHINE(refine_steps=200))
        return jnp.asarray(WEIGHTS) @ sol.value[:, 0]

    with jax.enable_x64(True):
        slope = jax.device_get(jax.jit(jax.grad(loss))(jnp.ones((3, 1))))
    np.testing.assert_allclose(slope[:, 0], np.linalg.solve(np.eye(3) - LINEAR.T, WEIGHTS), rtol=1e-6)
