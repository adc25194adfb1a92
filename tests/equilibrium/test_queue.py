"""The queue: every problem is solved as if alone, in fewer evaluations than batches take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import Anderson, Broyden, Picard, fixed_point, fixed_point_queue
from tests.cases import others_slow

PROBLEMS, N = 37, 6
RNG = np.random.default_rng(0)
W = RNG.normal(size=(N, N)) / N**0.5
X = RNG.normal(size=(PROBLEMS, N))
GAIN = np.where(np.arange(PROBLEMS) % 9 == 4, 1.4, 0.3)[:, None]  # some problems are hard
GAIN[20] = np.nan
SOLVERS = [
    Picard(1e-6, 60),
    Anderson(1e-6, 60, trace=True, memory=4, restart=True),
    Broyden(1e-6, 40, memory=10),
    Broyden(1e-6, 40, line_search=True),
]


def f(z, x, gain):
    return {"a": jnp.tanh(gain * (z["a"] @ W) + x), "b": 0.1 * z["b"] + jnp.sum(x, axis=1)}


Z0 = {"a": np.zeros_like(X), "b": np.zeros(PROBLEMS)}


@functools.cache
def both(solver, slots):
    with jax.enable_x64(True):
        z0, x, gain = jax.tree.map(jnp.asarray, (Z0, X, GAIN))
        run = jax.jit(lambda *a: (fixed_point_queue(f, *a, slots=slots, solver=solver), fixed_point(f, *a, solver=solver)))
        return jax.device_get(run(z0, x, gain))


@pytest.mark.parametrize("solver", others_slow(SOLVERS, SOLVERS[1:2]), ids=lambda s: f"{type(s).__name__} {s.trace}")
def test_every_problem_is_solved_as_if_alone(solver):
    queued, batch = both(solver, 4)
    np.testing.assert_array_equal(queued.stats.steps, batch.stats.steps)
    np.testing.assert_array_equal(queued.stats.converged, batch.stats.converged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), queued.value, batch.value)
    assert 0 < batch.stats.converged.sum() < PROBLEMS and not queued.stats.converged[20]
    if solver.trace:
        np.testing.assert_allclose(queued.stats.relative_trace, batch.stats.relative_trace, rtol=1e-4, atol=1e-9)


def test_slots_are_kept_full():
    """Each problem takes its own evaluations in some slot: no schedule of four slots needs less than a quarter of their sum."""
    queued, _ = both(SOLVERS[0], 4)
    own = np.where(queued.stats.converged == 1, queued.stats.steps + 1, 60)
    own[20] = 1
    assert own.sum() / 4 <= queued.stats.nfe <= own.sum() / 4 + own.max()
    batches = sum(own[i : i + 4].max() for i in range(0, PROBLEMS, 4))
    assert queued.stats.nfe < 0.7 * batches


@pytest.mark.parametrize("slots", [1, 37, 99])
def test_any_number_of_slots_gives_the_same(slots):
    few, many = both(SOLVERS[0], 4)[0], both(SOLVERS[0], slots)[0]
    np.testing.assert_array_equal(few.stats.steps, many.stats.steps)
    np.testing.assert_allclose(few.value["a"], many.value["a"], rtol=1e-9)


def test_the_limit_may_be_traced():
    run = jax.jit(lambda n: fixed_point_queue(lambda z: 0.9 * z + 1, jnp.zeros((5, 2)), slots=2, max_steps=n).stats)
    assert [(int(run(n).nfe), float(run(n).steps.max())) for n in (1, 2)] == [(3, 0.0), (6, 1.0)]
    assert run._cache_size() == 1


MODES = {"grad": lambda f: jax.grad(f)(1.0), "jvp": lambda f: jax.jvp(f, (1.0,), (1.0,))[1]}


def test_derivatives_are_refused_and_a_constant_f_has_none():
    """Started at the solution, where no step is taken that a derivative could be seen in."""
    x = np.ones((4, 3), np.float32)

    def total(a, f):
        sol = fixed_point_queue(f(a), 2 * a * x, x, slots=2, solver=Picard(max_steps=2))
        return a + sol.value.sum() + sol.stats.relative_residual.sum()

    for mode in MODES.values():
        with pytest.raises(NotImplementedError, match="fixed_point_queue has no derivatives: use fixed_point"):
            jax.jit(lambda: mode(lambda a: total(a, lambda a: lambda z, x: 0.5 * z + a * x))).lower()  # noqa: B023
    held = lambda a: total(a, lambda a: lambda z, x: jax.lax.stop_gradient(0.5 * z + a * x))  # noqa: E731
    assert jax.jit(lambda: [mode(held) for mode in MODES.values()])() == [1, 1]


def test_malformed_calls_are_refused():
    z0 = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"fixed_point_queue: slots must be in \[1, inf\), not 0"):
        fixed_point_queue(jnp.tanh, z0, slots=0)
    with pytest.raises(ValueError, match=r"inputs\[0\] has shape \[2, 3\].*that of z0, 3"):
        fixed_point_queue(lambda z, x: z, z0, z0.T, slots=2)
    with pytest.raises(ValueError, match="trajectory_steps"):
        fixed_point_queue(jnp.tanh, z0, slots=2, solver=Picard(trajectory_steps=(1,)))
    with pytest.raises(TypeError, match="must be a Solver"):
        fixed_point_queue(jnp.tanh, z0, slots=2, solver="broyden")
    with pytest.raises(ValueError, match=r"float32\[2, 1\]"):
        fixed_point_queue(lambda z: z[:, :1], z0, slots=2)
