"""Restarts: the best of answers that are found as if alone, and whether they agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import SHINE, Anderson, Implicit, Picard, Reversible, Unroll, fixed_point, fixed_point_restarts, path_independence

STARTS, BATCH, N = 5, 3, 6
RNG = np.random.default_rng(0)
W = 2.5 * RNG.normal(size=(N, N)) / N**0.5
X = RNG.normal(size=(BATCH, N))
Z0 = {"a": 2 * RNG.normal(size=(STARTS, BATCH, N)), "b": RNG.normal(size=(STARTS, BATCH))}
Z0["a"][1, 2] = np.nan  # never chosen


def f(z, x, w):
    return {"a": jnp.tanh(z["a"] @ w + x), "b": 0.1 * z["b"] + jnp.sum(x, axis=1)}


@pytest.fixture(scope="module")
def found():
    """The chosen and all answers with gradients, and each start solved by a call of its own."""
    options = {"solver": Anderson(1e-9, 25, trace=True), "gradient": Implicit(tol=1e-10)}

    def chosen(x, w):
        best, every = fixed_point_restarts(lambda z, x: f(z, x, w), Z0, x, **options)
        return jnp.sum(best.value["a"] ** 3), (best, every)

    def from_one_start(x, w, z0):
        sol = fixed_point(lambda z, x: f(z, x, w), z0, x, **options)
        return jnp.sum(sol.value["a"] ** 3, axis=1), sol

    def alone(x, w):
        return jax.lax.map(lambda z0: from_one_start(x, w, z0)[1], jax.tree.map(jnp.asarray, Z0))

    @jax.jit
    def slopes(x, w, start):
        """Of the best start of each sample, for it alone."""
        z0 = jax.tree.map(lambda leaf: jnp.asarray(leaf)[start, np.arange(BATCH)], Z0)
        return jax.grad(lambda x, w: jnp.sum(from_one_start(x, w, z0)[0]), argnums=(0, 1))(x, w)

    with jax.enable_x64(True):
        slope, (best, every) = jax.jit(jax.grad(chosen, argnums=(0, 1), has_aux=True))(X, W)
        each = jax.jit(alone)(X, W)
        residuals = np.where(np.isfinite(each.stats.relative_residual), each.stats.relative_residual, np.inf)
        start = residuals.argmin(axis=0)
        return jax.device_get((best, every, each, start, slope, slopes(X, W, start)))


def test_every_start_is_solved_as_if_alone(found):
    _, every, each, *_ = found
    np.testing.assert_array_equal(every.stats.steps, each.stats.steps)
    np.testing.assert_array_equal(every.stats.converged, each.stats.converged)
    assert every.stats.nfe == each.stats.nfe.max() and every.stats.relative_trace.shape == (STARTS, BATCH, 25)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), every.value, each.value)
    assert 0 < every.stats.converged.mean() < 1


def test_the_answer_of_the_lowest_residual_is_chosen_with_its_statistics(found):
    best, every, _, start, *_ = found
    assert len(set(start.tolist())) > 1 and start[2] != 1 and np.isfinite(best.stats.relative_residual).all()
    at = (start, np.arange(BATCH))
    np.testing.assert_array_equal(best.stats.relative_residual, np.nanmin(every.stats.relative_residual, axis=0))
    for name in ("steps", "converged", "absolute_residual", "relative_trace"):
        np.testing.assert_array_equal(getattr(best.stats, name), getattr(every.stats, name)[at])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[at]), best.value, every.value)


def test_the_gradient_is_that_of_the_chosen_answer(found):
    """Also with a start that is NaN beside it."""
    *_, slope, expected = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), slope, expected)


def test_with_an_absolute_stop_the_absolute_residual_decides():
    """The start of the larger value has the lower relative residual."""
    f = lambda z: 0.9 * z + 0.1 * jnp.sign(z) * jnp.where(jnp.abs(z) > 50, 100.0, 1.0)  # noqa: E731
    run = jax.jit(lambda z0, stop: fixed_point_restarts(f, z0, solver=Picard(1e-9, 1, stop=stop))[0].value, static_argnums=1)
    starts = np.float32([[[2.0]], [[101.0]]])
    assert [float(run(starts, stop)[0, 0]) for stop in ("relative", "absolute")] == [101.0, 2.0]


def test_path_independence_is_the_mean_similarity_of_pairs():
    """Against each pair, at scales whose squares are not in the range of float32; and what it is for equal answers."""
    states = {"a": RNG.normal(size=(4, 3, 2, 2)), "b": RNG.normal(size=(4, 3))}
    states["a"][:, 2], states["b"][:, 2] = states["a"][:1, 2], states["b"][:1, 2]
    flat = np.concatenate([states["a"].reshape(4, 3, 4), states["b"][..., None]], axis=2)
    unit = flat / np.linalg.norm(flat, axis=2, keepdims=True)
    pairs = np.mean([np.sum(unit[i] * unit[j], axis=1) for i in range(4) for j in range(i)], axis=0)
    run = jax.jit(path_independence)
    for scale in (1.0, 1e-25, 1e25):
        measured = run(jax.tree.map(lambda leaf, scale=scale: np.float32(scale * leaf), states))
        np.testing.assert_allclose(measured, pairs, atol=1e-6)
        assert measured[2] == pytest.approx(1, abs=1e-6) and measured.max() < 1 + 1e-6
    np.testing.assert_array_equal(run(np.zeros((2, 1, 3), np.float32)), [0])


@pytest.mark.slow
def test_path_independence_tells_one_fixed_point_from_two():
    starts = jnp.linspace(-2, 2, 4)[:, None, None] * jnp.ones((1, 2, 3))
    gain = jnp.array([[0.5], [2.0]])  # z = tanh(2 z) has two stable solutions
    run = jax.jit(lambda z0, gain: fixed_point_restarts(lambda z, g: jnp.tanh(g * z) + 0.01 * g, z0, gain)[1])
    every = run(starts, gain)
    np.testing.assert_allclose(path_independence(every.value), [1, -1 / 3], atol=1e-4)
    assert every.stats.converged.all()


def test_malformed_calls_are_refused():
    starts = jnp.zeros((4, 3, 2))
    with pytest.raises(ValueError, match=r"starts must be arrays.*starts\['b'\] \[4\]"):
        fixed_point_restarts(jnp.tanh, {"a": starts, "b": jnp.zeros(4)})
    with pytest.raises(ValueError, match=r"inputs\[0\]\['x'\] has shape \[4, 2\].*second of starts, 3"):
        fixed_point_restarts(lambda z, x: z, starts, {"x": jnp.zeros((4, 2))})
    with pytest.raises(ValueError, match="starts must be arrays"):
        fixed_point_restarts(jnp.tanh, starts[:0])
    with pytest.raises(ValueError, match="trajectory_steps"):
        fixed_point_restarts(jnp.tanh, starts, solver=Picard(trajectory_steps=(1,)))
    with pytest.raises(TypeError, match="must be a Solver"):
        fixed_point_restarts(jnp.tanh, starts, solver="broyden")
    with pytest.raises(TypeError, match="gradient must be an object"):
        fixed_point_restarts(jnp.tanh, starts, gradient=Implicit)
    for gradient in (Unroll(3), Reversible(), SHINE()):
        with pytest.raises(ValueError, match=f"{type(gradient).__name__} differentiates the path"):
            fixed_point_restarts(jnp.tanh, starts, gradient=gradient)
    with pytest.raises(ValueError, match="at least 2 starts"):
        path_independence(starts[:1])
