"""Gradients of a fixed point, against finite differences, an unrolled solve and a dense linear solve, in every JAX mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import Anderson, Broyden, Implicit, Picard, Unroll, backward_probe, fixed_point

TIGHT = Broyden(tol=1e-13, max_steps=80)


def problem():
    k = jax.random.split(jax.random.key(0), 4)
    w = 0.7 * jax.random.normal(k[0], (6, 6)) / 6**0.5
    return w, jax.random.normal(k[1], (3, 6)), jax.random.normal(k[2], (3, 6)), jax.random.normal(k[3], (3, 6))


def cell(z, w, x):
    return jnp.tanh(z @ w + x)


def loss(w, x, gradient=None, solver=TIGHT):
    sol = fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=gradient or Implicit())
    return jnp.sum(jnp.sin(sol.value) * jnp.arange(1.0, 7.0)[None])


def close(a, b, rtol=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-11), a, b)


def test_against_finite_differences():
    with jax.enable_x64(True):
        w, x, dx, _ = problem()
        h = 1e-5
        slope = (loss(w, x + h * dx) - loss(w, x - h * dx)) / (2 * h)
        close(jnp.sum(jax.grad(loss, argnums=1)(w, x) * dx), slope, rtol=1e-7)


def test_against_400_unrolled_steps():
    with jax.enable_x64(True):
        w, x, _, _ = problem()
        close(jax.grad(loss, argnums=(0, 1))(w, x), jax.grad(loss, argnums=(0, 1))(w, x, Unroll(400)))


def test_against_a_dense_solve():
    """dL/dx = (dL/dz) (I - J)^{-1} df/dx."""
    with jax.enable_x64(True):
        w, x, _, _ = problem()
        z = fixed_point(cell, jnp.zeros_like(x), w, x, solver=TIGHT).value
        for b in range(3):
            jz = jax.jacobian(lambda z: cell(z, w, x[b]))(z[b])  # noqa: B023
            jx = jax.jacobian(lambda x: cell(z[b], w, x))(x[b])  # noqa: B023
            upstream = jnp.cos(z[b]) * jnp.arange(1.0, 7.0)
            close(jax.grad(loss, argnums=1)(w, x)[b], upstream @ jnp.linalg.solve(jnp.eye(6) - jz, jx))


@pytest.mark.parametrize("adjoint", [Picard(tol=1e-12, max_steps=300), Anderson(tol=1e-12, max_steps=100), Broyden(tol=1e-12)])
def test_adjoint_solver_is_chosen_apart(adjoint):
    with jax.enable_x64(True):
        w, x, _, _ = problem()
        close(jax.grad(loss)(w, x, Implicit(adjoint)), jax.grad(loss)(w, x), rtol=1e-8)


def test_looser_adjoint_costs_less_and_errs_more():
    with jax.enable_x64(True):
        w, x, _, _ = problem()
        exact = jax.grad(loss)(w, x)
        error = [float(jnp.abs(jax.grad(loss)(w, x, Implicit(tol=t)) - exact).max()) for t in (1e-2, 1e-6)]
        assert error[1] < 1e-5 < error[0]
        one = jax.grad(loss)(w, x, Implicit(max_steps=1))
        assert float(jnp.abs(one - exact).max()) > 1e-3


MODES = {
    "jvp": lambda f, x, v: jax.jvp(f, (x,), (v,))[1],
    "linearize": lambda f, x, v: jax.linearize(f, x)[1](v),
    "jacfwd": lambda f, x, v: jax.jacfwd(f)(x),
    "jacrev": lambda f, x, v: jax.jacrev(f)(x),
    "hessian": lambda f, x, v: jax.hessian(f)(x),
    "hvp forward over reverse": lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "hvp reverse over forward": lambda f, x, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x),
    "hvp reverse over reverse": lambda f, x, v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
    "vmap of grad": lambda f, x, v: jax.vmap(jax.grad(f))(jnp.stack([x, x + v])),
    "grad of vmap": lambda f, x, v: jax.grad(lambda s: jax.vmap(f)(s).sum())(jnp.stack([x, x + v])),
    "checkpoint": lambda f, x, v: jax.grad(jax.checkpoint(f))(x),
    "scan": lambda f, x, v: jax.grad(lambda x: jax.lax.scan(lambda c, t: (f(x * (1 + t)) + c, None), 0.0, v[0])[0])(x),
    "cond": lambda f, x, v: jax.grad(lambda x: jax.lax.cond(x[0, 0] < 9, f, lambda x: 0.0, x))(x),
    "jit": lambda f, x, v: jax.jit(jax.grad(f))(x),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_differentiation(mode):
    with jax.enable_x64(True):
        w, x, v, _ = problem()
        x, v = x[:1], v[:1]
        ours, unrolled = (MODES[mode](lambda x, g=g: loss(w, x, g), x, v) for g in (Implicit(), Unroll(200)))
        close(ours, unrolled, rtol=1e-8)


def test_the_initial_guess_gets_no_gradient():
    w, x, z0, _ = problem()
    gradient = jax.grad(lambda z0: fixed_point(cell, z0, w, x).value.sum())(z0)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(z0))


@pytest.mark.parametrize("gradient", [Implicit(), Unroll(3)])
def test_statistics_carry_no_gradient(gradient):
    w, x, _, _ = problem()

    def residual(x):
        return fixed_point(
            cell, jnp.zeros_like(x), w, x, solver=Picard(max_steps=4), gradient=gradient
        ).stats.relative_residual.sum()

    np.testing.assert_array_equal(jax.grad(residual)(x), jnp.zeros_like(x))


def test_zero_cotangent_costs_one_adjoint_evaluation():
    w, x, _, _ = problem()
    run = lambda w, p: 0.0 * fixed_point(cell, jnp.zeros_like(x), w, x, probe=p).value.sum()  # noqa: E731
    gradient, report = jax.grad(run, argnums=(0, 1))(w, backward_probe())
    np.testing.assert_array_equal(gradient, jnp.zeros_like(w))
    assert report[0] == 1 and report[1] == 0


def test_a_batch_member_that_fails_forward_leaves_the_gradients_of_others():
    w, x, _, _ = problem()
    poison = jnp.where(jnp.arange(3) == 1, jnp.nan, 1.0)[:, None]

    def total(x, poison):
        sol = fixed_point(lambda z: cell(z, w, x) * poison, jnp.zeros_like(x))
        return jnp.where(sol.stats.converged[:, None] == 1, sol.value, 0.0).sum()

    bad, good = jax.grad(total)(x, poison), jax.grad(total)(x, jnp.ones((3, 1)))
    np.testing.assert_allclose(bad[jnp.array([0, 2])], good[jnp.array([0, 2])], rtol=1e-5)


def test_probe_reports_the_adjoint_solve():
    with jax.enable_x64(True):
        w, x, _, _ = problem()

        def run(w, probe, gradient):
            return jnp.sum(fixed_point(cell, jnp.zeros_like(x), w, x, solver=TIGHT, gradient=gradient, probe=probe).value)

        g, report = jax.grad(run, argnums=(0, 1))(w, backward_probe(), Implicit(tol=1e-5))
        assert 2 <= report[0] < TIGHT.max_steps and 0 < report[1] <= 1e-5 and report[2] == 1
        without = jax.grad(run)(w, None, Implicit(tol=1e-5))
        np.testing.assert_array_equal(g, without)
        many = jax.grad(lambda p: sum(run(w, p, Implicit(tol=1e-5)) for _ in range(3)))(backward_probe())
        np.testing.assert_allclose(many, 3 * report)
        forward = jax.jvp(lambda w: run(w, backward_probe(), Implicit()), (w,), (jnp.ones_like(w),))[1]
        np.testing.assert_allclose(forward, jnp.sum(jax.grad(run)(w, None, Implicit())), rtol=1e-8)


def test_leaves_that_do_not_depend_on_what_is_differentiated():
    with jax.enable_x64(True):

        def run(x, gradient):
            f = lambda z: {"a": 0.5 * jnp.cos(z["b"]), "b": 0.5 * jnp.sin(z["a"]) + x}  # noqa: E731
            z0 = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3))}
            return fixed_point(f, z0, solver=TIGHT, gradient=gradient).value["a"].sum()

        x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
        close(jax.grad(run)(x, Implicit()), jax.grad(run)(x, Unroll(100)))


def test_unroll_is_the_plain_composition():
    w, x, _, _ = problem()
    sol = fixed_point(cell, jnp.zeros_like(x), w, x, gradient=Unroll(2))
    z2 = cell(cell(jnp.zeros_like(x), w, x), w, x)
    np.testing.assert_allclose(sol.value, z2, rtol=1e-6)
    r = jnp.linalg.norm(cell(z2, w, x) - z2, axis=1)
    np.testing.assert_allclose(sol.stats.absolute_residual, r, rtol=1e-5)
    assert (sol.stats.steps == 2).all() and sol.stats.nfe == 3
    remat = jax.grad(lambda w: loss(w, x, Unroll(5, remat=True)))(w)
    np.testing.assert_allclose(remat, jax.grad(lambda w: loss(w, x, Unroll(5)))(w), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        Unroll(0)


def test_memory_of_the_gradient_does_not_grow_with_the_iterations():
    """Peak temporary bytes of the compiled gradient: only the solver's own bounded history, whatever the limit."""
    w, x, _, _ = problem()

    def peak(steps):
        step = jax.jit(jax.grad(lambda w: loss(w, x, Implicit(), Anderson(tol=0, max_steps=steps))))
        return step.lower(w).compile().memory_analysis().temp_size_in_bytes

    assert peak(60) == peak(10)
