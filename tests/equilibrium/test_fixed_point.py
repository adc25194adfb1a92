"""`fixed_point` around a solver and a gradient: failures, trajectories, aux, shapes, shards."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deq_flax import (
    SHINE,
    Anderson,
    Broyden,
    Implicit,
    JacobianFree,
    Neumann,
    PhantomGradient,
    Picard,
    Reversible,
    Unroll,
    fixed_point,
    fixed_point_correction_loss,
)
from deq_flax.equilibrium.fixed_point import flattener
from tests.cases import others_slow
from tests.equilibrium.dense import cell, close, loss, problem, run
from tests.equilibrium.test_compiled import outside_entry


@functools.partial(jax.jit, static_argnames=("gradient", "on_failure"))
def slopes(w, x, gain, gradient, on_failure):
    """Return gradients where each sample has a gain of its own: one far above 1 never converges."""

    def total(w, x):
        f = lambda z: jnp.tanh(gain * (z @ w) + x)  # noqa: E731
        sol = fixed_point(f, jnp.zeros_like(x), solver=Picard(tol=1e-5, max_steps=60), gradient=gradient, on_failure=on_failure)
        return loss(sol.value), sol

    return jax.grad(total, argnums=(0, 1), has_aux=True)(w, x)


@pytest.mark.parametrize(
    "gradient",
    others_slow([Implicit(), PhantomGradient(), Reversible()], [Implicit()]),
    ids=lambda g: type(g).__name__,
)
def test_on_failure_changes_the_gradient_of_failed_samples_only(gradient):
    w, x, _ = problem()
    gain = np.float32([[0.2], [30.0], [0.2]])
    (_, kept), sol = jax.device_get(slopes(w, x, gain, gradient, "return"))
    np.testing.assert_array_equal(sol.stats.converged, [1, 0, 1])
    (nan_w, nan), with_nan = jax.device_get(slopes(w, x, gain, gradient, "nan"))
    (zero_w, zero), with_zero = jax.device_get(slopes(w, x, gain, gradient, "zero_gradient"))
    healthy = np.array([0, 2])
    close(nan[healthy], kept[healthy], rtol=1e-6)
    close(zero[healthy], kept[healthy], rtol=1e-6)
    assert np.isfinite(kept).all() and np.isnan(nan[1]).all() and (zero[1] == 0).all() and np.isnan(nan_w).all()
    by_hand = slopes(w, x[healthy], gain[healthy], gradient, "return")[0][0]
    close(zero_w, by_hand, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, (with_nan.value, with_zero.value), (sol.value, sol.value))


@pytest.mark.parametrize("gradient", [PhantomGradient(20, 1.0), Unroll(30, last=3)], ids=lambda g: type(g).__name__)
def test_zero_gradient_is_zero_where_the_differentiated_steps_overflow(gradient):
    """z = a (z^2 + 1) has no real solution for a = 10: its iterates overflow, and their slopes are infinite."""
    gain = np.float32([[0.1], [10.0]])

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def slope(a):
        f = lambda z: a * gain * (z * z + 1)  # noqa: E731
        sol = fixed_point(f, jnp.zeros_like(gain), solver=Picard(), gradient=gradient, on_failure="zero_gradient")
        return sol.value.sum(), sol.stats.converged

    total, converged = slope(1.0)
    np.testing.assert_array_equal(converged, [1, 0])
    z = (1 - np.sqrt(1 - 4 * 0.1**2)) / 0.2
    exact = 0.1 * (z * z + 1) / (1 - 0.2 * z)  # dz / da of the other sample
    np.testing.assert_allclose(total, exact, rtol=1e-4)


def test_unknown_on_failure_is_refused():
    with pytest.raises(ValueError, match="known: return, nan, zero_gradient"):
        fixed_point(jnp.tanh, jnp.zeros((1, 2)), on_failure="raise")


def test_trajectory_carries_the_gradient_of_one_evaluation():
    with jax.enable_x64(True):
        w, x, _ = problem()
        solver = Anderson(trajectory_steps=(1, 3))

        def solution(w):
            return fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver)

        @jax.jit
        def all_of_it(w):
            sol = solution(w)
            sampled = jax.grad(lambda w: sum(loss(z) for z in solution(w).trajectory))(w)
            one_step = jax.grad(lambda w: sum(jnp.vdot(jax.grad(loss)(z), cell(z, w, x)) for z in sol.trajectory))(w)
            total = fixed_point_correction_loss(loss, sol, gamma=0.5)
            return sampled, one_step, total, 0.25 * loss(sol.trajectory[0]) + 0.5 * loss(sol.trajectory[1]) + loss(sol.value)

        sampled, one_step, total, by_hand = all_of_it(w)
        close(sampled, one_step)
        np.testing.assert_allclose(total, by_hand, rtol=1e-12)
        with pytest.raises(ValueError, match="trajectory_steps"):
            fixed_point_correction_loss(loss, run(w, x, Picard(), Implicit()))


leaf = st.tuples(st.lists(st.integers(1, 3), max_size=2), st.sampled_from([np.float32, jnp.bfloat16]))


@pytest.mark.slow
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.integers(1, 3), st.lists(leaf, min_size=1, max_size=3))
def test_any_pytree_is_flattened_restored_solved_and_differentiated(batch, leaves):
    """z = z / 2 + c has z* = 2 c and dz*/dc = 2."""
    c = [np.arange(batch * np.prod(shape, dtype=int)).reshape(batch, *shape).astype(dtype) for shape, dtype in leaves]

    def total(c):
        f = lambda z: [a / 2 + b for a, b in zip(z, c, strict=True)]  # noqa: E731
        value = fixed_point(f, [jnp.zeros_like(x) for x in c], solver=Picard(tol=1e-3)).value
        return sum(x.astype(jnp.float32).sum() for x in value), value

    @jax.jit
    def all_of_it(c):
        flatten, unflatten = flattener(c)
        flat = flatten(c)
        return flat, unflatten(flat), *jax.grad(total, has_aux=True)(c)

    flat, back, slope, value = jax.device_get(all_of_it(c))
    assert flat.shape == (batch, sum(x[0].size for x in c)) and flat.dtype == np.float32
    for i, x in enumerate(c):
        assert x.dtype == back[i].dtype == slope[i].dtype == value[i].dtype
        np.testing.assert_array_equal(back[i], x)
        np.testing.assert_allclose(value[i].astype(float), 2 * x.astype(float), rtol=2e-2, atol=1e-2)
        np.testing.assert_allclose(slope[i].astype(float), 2.0, rtol=2e-2)


@pytest.mark.parametrize(
    "gradient", others_slow([Implicit(), SHINE(), Reversible()], [Implicit(), SHINE()]), ids=lambda g: type(g).__name__
)
def test_shards_solve_without_communication(gradient):
    """Inside shard_map no loop holds a collective, and value and gradients are those of the whole batch."""
    with jax.enable_x64(True):
        w, x, _ = problem()
        x = np.concatenate([x, 3 * x, 0.1 * x, -x])

        def local(w, x):
            sol = fixed_point(cell, jnp.zeros_like(x), w, x, solver=Broyden(tol=1e-4), gradient=gradient)
            return loss(sol.value), sol.stats.nfe

        def sharded(w, x):
            total, nfe = local(w, x)
            return jax.lax.psum(total, "data"), nfe[None]

        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        mapped = jax.shard_map(sharded, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data")), check_vma=False)
        step = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))  # noqa: E731
        compiled = step(mapped).lower(w, x).compile()
        text = compiled.as_text()
        collectives = re.findall(r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)", text)
        assert collectives and " while(" in text, "one sum of the loss, one of the gradient"
        assert not re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute)", outside_entry(text))
        (value, nfe), got = compiled(w, x)
        (whole, _), expected = step(local)(w, x)
        assert len(set(nfe.tolist())) > 1, "the shards should stop by themselves"
        np.testing.assert_allclose(value, whole, rtol=1e-12)
        close(got, expected, rtol=1e-7)


AUX_GRADIENTS = [Implicit(), Neumann(2), JacobianFree(), PhantomGradient(2), SHINE(), Reversible(), Unroll(30)]


def with_aux(w, x, gradient, batched=True, on_failure="return"):
    """Solve a pair of leaves with an aux of many dtypes, one of them a function of z, x and w."""

    def f(z, w, x):
        a = cell(z["a"], w, x)
        aux = {"mean": jnp.mean(jnp.sin(z["a"]) * a), "sign": (a > 0).astype(jnp.int32), "z": z}
        return {"a": a, "b": 0.5 * jnp.cos(z["b"])}, aux

    z0 = {"a": jnp.zeros_like(x), "b": jnp.zeros_like(x)}
    options = {"solver": Broyden(), "gradient": gradient, "batched": batched, "on_failure": on_failure}
    return f, fixed_point(f, z0, w, x, has_aux=True, **options)


@pytest.mark.parametrize(
    "gradient",
    others_slow(AUX_GRADIENTS, [g for g in AUX_GRADIENTS if isinstance(g, Implicit | Unroll)]),
    ids=lambda g: type(g).__name__,
)
def test_aux_is_that_of_the_returned_iterate_and_differentiable(gradient):
    """The same as a further evaluation of f by hand at the solution, in value and in gradient; the value is unchanged."""
    with jax.enable_x64(True):
        w, x, _ = problem()

        def ours(w, x):
            sol = with_aux(w, x, gradient)[1]
            return sol.aux["mean"], sol

        def by_hand(w, x):
            f, _ = with_aux(w, x, gradient)
            z0 = {"a": jnp.zeros_like(x), "b": jnp.zeros_like(x)}
            sol = fixed_point(lambda z: f(z, w, x)[0], z0, gradient=gradient)
            aux = f(sol.value, w, x)[1]
            return aux["mean"], (sol, aux)

        differentiate = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(w, x)  # noqa: E731
        ((_, sol), slope), ((_, (plain, aux)), expected) = jax.device_get((differentiate(ours), differentiate(by_hand)))
        assert min(np.abs(leaf).max() for leaf in slope) > 0
        close(slope, expected, rtol=1e-10)
        close(sol.aux, aux, rtol=1e-12)
        jax.tree.map(np.testing.assert_array_equal, sol.aux["z"], sol.value)
        jax.tree.map(np.testing.assert_array_equal, (sol.value, sol.stats), (plain.value, plain.stats))
        assert sol.aux["sign"].dtype == np.int32 and plain.aux is None


def test_aux_of_a_single_problem_has_no_batch_axis():
    w, x, _ = problem(batch=1)
    run = jax.jit(lambda w, x, b: with_aux(w, x, Implicit(), batched=b)[1], static_argnums=2)
    one, many = jax.device_get((run(w, x[0], False), run(w, x, True)))
    np.testing.assert_allclose(one.aux["mean"], many.aux["mean"], rtol=1e-6)
    np.testing.assert_array_equal(one.aux["sign"], many.aux["sign"][0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-6), one.aux["z"], many.aux["z"])


def test_aux_takes_one_evaluation_more_than_the_solve():
    calls = []

    def f(z):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * z + 1, jnp.sum(z)

    count = lambda f, aux: int(jax.jit(lambda z: fixed_point(f, z, solver=Picard(), has_aux=aux).stats.nfe)(np.zeros((1, 2))))  # noqa: E731
    nfe = count(f, True)
    jax.effects_barrier()
    with_it = len(calls)
    assert count(lambda z: f(z)[0], False) == nfe
    jax.effects_barrier()
    assert with_it == nfe + 1 and len(calls) == with_it + nfe


def test_on_failure_gates_the_path_from_aux_through_the_iterate():
    """A sample with a large gain fails; aux depends on z and on x itself, at a slope of 1."""

    def slope(on_failure):
        f = lambda z, x: (jnp.tanh(jnp.float32([[0.2], [-30.0]]) * z + x), z + x)  # noqa: E731
        options = {"solver": Picard(max_steps=30), "has_aux": True, "on_failure": on_failure}
        return jax.jit(jax.grad(lambda x: jnp.sum(fixed_point(f, jnp.zeros_like(x), x, **options).aux)))(jnp.ones((2, 1)))

    kept, zero, nan = (slope(way) for way in ("return", "zero_gradient", "nan"))
    np.testing.assert_array_equal(zero[0], kept[0])
    assert kept[0] > 1 and zero[1] == 1 and np.isnan(nan[1]) and np.isfinite(nan[0])


@pytest.mark.parametrize("f", [jnp.tanh, lambda z: (z, 1, 2), lambda z: [z, z]])
def test_without_a_pair_aux_is_refused(f):
    with pytest.raises(ValueError, match="must return a pair"):
        fixed_point(f, jnp.zeros((1, 2)), has_aux=True)
