"""f that couples the samples of a batch: what is reported is true of what is returned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import Anderson, Broyden, Picard, fixed_point

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


@pytest.mark.parametrize("method", [Picard, *(pytest.param(m, marks=pytest.mark.slow) for m in (Anderson, Broyden))])
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
