"""Truncated unrolling: the last steps are differentiated, the number of free ones is an argument of the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import Picard, Unroll, fixed_point
from tests.cases import others_slow
from tests.equilibrium.dense import cell, close, gradients, loss, problem, run


def by_hand(w, x, steps, last, relaxation=1.0, noise=0.0, key=None):
    """`steps` relaxed steps from zero in plain JAX; the iterate before the last ones is held constant."""
    z = jnp.zeros_like(x)
    for k in range(steps):
        z = jax.lax.stop_gradient(z) if k == steps - last else z
        z = (1 - relaxation) * z + relaxation * cell(z, w, x)
        z = z if key is None else z + noise * jax.random.normal(jax.random.fold_in(key, k), z.shape, z.dtype)
    return z


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(("steps", "last", "relaxation"), [(5, 5, 1.0), (5, 2, 1.0), (6, 1, 0.7), (1, 1, 0.5)])
def test_value_and_gradient_are_those_of_the_truncation_written_out(steps, last, relaxation, remat):
    with jax.enable_x64(True):
        w, x, _ = problem()
        value, slope = jax.jit(
            lambda w, x: (
                by_hand(w, x, steps, last, relaxation),
                jax.grad(lambda w, x: loss(by_hand(w, x, steps, last, relaxation)), argnums=(0, 1))(w, x),
            )
        )(w, x)
        result = run(w, x, Picard(), Unroll(steps, last, remat=remat, relaxation=relaxation))
        close((result.value, gradients(result)), (value, slope))
        if last == steps:
            full = run(w, x, Picard(), Unroll(steps, remat=remat, relaxation=relaxation))
            close((full.value, gradients(full)), (value, slope))


def test_a_traced_limit_takes_as_many_steps_without_compiling_again():
    """From one step to more than there are; below `last` all steps are differentiated. Value, gradient and statistics."""
    w, x, _ = problem()
    traced = []

    @jax.jit
    def solve(w, x, limit):
        traced.append(None)

        def total(w, x):
            solver = Picard(tol=1e-2, trajectory_steps=(0, 3, 20))
            sol = fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=Unroll(7, last=3), max_steps=limit)
            return loss(sol.value), sol

        return jax.grad(total, argnums=(0, 1), has_aux=True)(w, x)

    evaluated = []
    for limit, steps in ((1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (9, 7), (0, 1)):
        slope, sol = jax.device_get(solve(w, x, np.int32(limit)))
        expected = run(w, x, Picard(tol=1e-2, trajectory_steps=(0, 3, 20)), Unroll(steps, last=min(3, steps)))
        close(slope, gradients(expected), rtol=1e-5, atol=1e-6)
        close((sol.value, sol.trajectory), (expected.value, expected.trajectory), rtol=1e-6, atol=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), sol.stats, expected.stats)
        assert sol.stats.nfe == steps + 1 and (sol.stats.steps == steps).all()
        evaluated.append(sol.stats.converged)
    assert len(traced) == 1
    assert np.mean(evaluated[0]) == 0 < np.mean(evaluated[4]), "the tolerance decides what counts as converged"


def test_the_statistics_are_those_of_the_last_iterate():
    w, x, _ = problem()
    sol = run(w, x, Picard(tol=1e-4), Unroll(6, last=1))
    residual = np.linalg.norm(cell(sol.value, w, x) - sol.value, axis=1)
    np.testing.assert_allclose(sol.stats.absolute_residual, residual, rtol=1e-3)
    np.testing.assert_allclose(sol.stats.relative_residual, residual / np.linalg.norm(cell(sol.value, w, x), axis=1), rtol=1e-3)
    np.testing.assert_array_equal(sol.stats.converged, sol.stats.relative_residual <= 1e-4)


def test_nothing_is_evaluated_beyond_the_limit():
    """f(z) = sqrt(a - z) from 0: its slope is infinite at the first iterate, sqrt(a), when a = 1."""

    @jax.jit
    @jax.grad
    def slope(a, limit):
        f = lambda z: jnp.sqrt(a - z)  # noqa: E731
        return fixed_point(f, jnp.zeros((1, 1)), gradient=Unroll(4, last=4), max_steps=limit).value.sum()

    np.testing.assert_allclose(slope(1.0, np.int32(1)), 0.5)


def test_memory_depends_on_the_differentiated_steps_alone():
    w, x, _ = problem()

    def peak(steps, last):
        f = lambda w: loss(fixed_point(cell, jnp.zeros_like(x), w, x, gradient=Unroll(steps, last)).value)  # noqa: E731
        return jax.jit(jax.grad(f)).lower(w).compile().memory_analysis().temp_size_in_bytes

    assert peak(1000, 2) == peak(10, 2) < peak(40, 40)


def test_rematerialization_keeps_the_states_alone():
    """Of 40 steps of eight layers each: the peak of temporary bytes, where f's own values are kept and where they are not."""
    w, x, _ = problem()

    def deep(z, w, x):
        for _ in range(8):
            z = jnp.tanh(z @ w + x)
        return z

    def peak(remat):
        f = lambda w: loss(fixed_point(deep, jnp.zeros_like(x), w, x, gradient=Unroll(40, remat=remat)).value)  # noqa: E731
        return jax.jit(jax.grad(f)).lower(w).compile().memory_analysis().temp_size_in_bytes

    assert peak(True) < peak(False) / 3


BOTH = {"noise": 0.1, "remat": True}


@pytest.mark.parametrize("options", others_slow([{}, {"remat": True}, {"noise": 0.1}, BOTH], [{}, BOTH]), ids=str)
def test_every_mode_of_differentiation_agrees_with_the_truncation_written_out(options):
    """Forward, Hessian, forward over reverse, and inside vmap, scan and checkpoint, with a traced limit."""
    with jax.enable_x64(True):
        w, x, v = problem()
        noise, key = options.get("noise", 0.0), jax.random.key(3) if "noise" in options else None

        def ours(x, limit):
            gradient = Unroll(5, last=2, relaxation=0.8, key=key, **options)
            return loss(fixed_point(cell, jnp.zeros_like(x), w, x, gradient=gradient, max_steps=limit).value)

        plain = lambda x, _: loss(by_hand(w, x, 5, 2, 0.8, noise, key))  # noqa: E731

        @functools.partial(jax.jit, static_argnums=0)
        def modes(f, x, v, limit):
            g = functools.partial(f, limit=limit) if f is ours else lambda x: plain(x, limit)
            scanned = lambda x: jax.lax.scan(lambda c, s: (c + jax.checkpoint(g)(s * x), None), 0.0, jnp.arange(1.0, 3.0))[0]  # noqa: E731
            return (
                jax.jvp(g, (x,), (v,))[1],
                jax.jvp(jax.grad(g), (x,), (v,))[1],
                jax.grad(lambda x: jnp.vdot(jax.grad(g)(x), v))(x),
                jax.vmap(jax.grad(g))(jnp.stack([x, 2 * x])),
                jax.grad(scanned)(x),
            )

        close(modes(ours, x, v, np.int32(5)), modes(plain, x, v, np.int32(5)), rtol=1e-8)
        limits = jnp.array([1, 5])
        many = jax.jit(lambda x: jax.vmap(lambda limit: jax.grad(ours)(x, limit))(limits))(x)
        one = jax.jit(jax.grad(ours))
        close(many, jnp.stack([one(x, limit) for limit in limits]), rtol=1e-8)


def test_noise_is_drawn_anew_in_every_step_and_only_with_a_key():
    """With f the identity the iterate is a sum of independent normal variables."""

    @functools.partial(jax.jit, static_argnums=1)
    def walk(key, steps):
        z0 = jnp.zeros((2, 20_000))
        return fixed_point(lambda z: z, z0, gradient=Unroll(steps, last=2, noise=0.1, key=key)).value

    one, four = walk(jax.random.key(0), 2), walk(jax.random.key(0), 8)
    np.testing.assert_allclose(np.std(one, axis=1), 0.1 * 2**0.5, rtol=0.03)
    np.testing.assert_allclose(np.std(four, axis=1), 0.1 * 8**0.5, rtol=0.03)
    assert abs(np.corrcoef(four)[0, 1]) < 0.03, "samples have noise of their own"
    assert not np.asarray(walk(None, 8)).any()
    assert np.abs(walk(jax.random.key(1), 2) - one).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0}, r"last must be in \[1, 3\], not 0"),
        ({"last": 4}, r"last must be in \[1, 3\], not 4"),
        ({"relaxation": 0.0}, "relaxation"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Unroll(3, **options)
