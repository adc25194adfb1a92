"""The implicit gradient: every JAX mode, its adjoint solvers, its report, and what has no gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import GMRES, Anderson, Broyden, Implicit, Picard, Unroll, backward_probe, fixed_point
from deq_flax.equilibrium import SOLVERS, LinearSolver
from tests.cases import others_slow
from tests.equilibrium.dense import TIGHT, WEIGHTS, adjoint, cell, close, gradients, loss, problem, run


def test_against_finite_differences():
    with jax.enable_x64(True):
        w, x, dx = problem()
        h = 1e-5
        value = lambda x: np.sum(np.sin(run(w, x, TIGHT, Implicit()).value) * WEIGHTS)  # noqa: E731
        slope = (value(x + h * dx) - value(x - h * dx)) / (2 * h)
        close(np.sum(gradients(run(w, x, TIGHT, Implicit()))[1] * dx), slope, rtol=1e-7)


ADJOINT = [None, Broyden(tol=1e-12), Anderson(tol=1e-12, max_steps=100), GMRES(tol=1e-12)]


@pytest.mark.parametrize("solver", ADJOINT, ids=lambda s: type(s).__name__)
def test_exact_by_every_adjoint_solver(solver):
    with jax.enable_x64(True):
        w, x, _ = problem()
        result = run(w, x, TIGHT, Implicit(solver))
        exact = adjoint(w, x, result.value, lambda j, v: np.linalg.solve(np.eye(6) - j.T, v))
        close(gradients(result), exact, rtol=1e-8)


def modes(f, x, v):
    """Return functions of arrays by the name of the mode."""
    return {
        "jvp": lambda x: jax.jvp(f, (x,), (v,))[1],
        "linearize": lambda x: jax.linearize(f, x)[1](v),
        "jacfwd": jax.jacfwd(f),
        "jacrev": jax.jacrev(f),
        "hessian": jax.hessian(f),
        "hvp forward over reverse": lambda x: jax.jvp(jax.grad(f), (x,), (v,))[1],
        "hvp reverse over forward": jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1]),
        "hvp reverse over reverse": jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v)),
        "vmap of grad": lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x + v])),
        "grad of vmap": lambda x: jax.grad(lambda s: jax.vmap(f)(s).sum())(jnp.stack([x, x + v])),
        "checkpoint": jax.grad(jax.checkpoint(f)),
        "scan": jax.grad(lambda x: jax.lax.scan(lambda c, t: (f(x + t * v) + c, None), 0.0, jnp.arange(2.0))[0]),
        "cond": jax.grad(lambda x: jax.lax.cond(x[0, 0] < 9, f, lambda x: 0.0, x)),
        "eager": jax.grad(f),
    }


@functools.cache
def expected():
    """Return the gradient at x and at x + v, and the Hessian at x, of an unrolled solve."""
    with jax.enable_x64(True):
        w, x, v = problem(batch=1)
        f = lambda x: loss(fixed_point(cell, jnp.zeros_like(x), w, x, gradient=Unroll(150)).value)  # noqa: E731
        gradient, hessian = jax.jit(lambda x: (jax.grad(f)(x), jax.jacfwd(jax.grad(f))(x)))(x)
        return jax.device_get((gradient, jax.jit(jax.grad(f))(x + v), hessian, v))


def expected_of(mode):
    gradient, gradient_at_v, hessian, v = expected()
    if mode.startswith("hvp"):
        return np.einsum("abcd,cd->ab", hessian, v)
    per_mode = {"hessian": hessian, "scan": gradient + gradient_at_v}
    if mode in ("jvp", "linearize"):
        return np.vdot(gradient, v)
    if "vmap" in mode:
        return np.stack([gradient, gradient_at_v])
    return per_mode.get(mode, gradient)


MODES = modes(jnp.sum, None, None)
FURTHER = {"jacrev", "jacfwd", "hvp reverse over forward", "hvp reverse over reverse", "grad of vmap"}


@pytest.mark.parametrize("mode", others_slow(MODES, MODES.keys() - FURTHER))
def test_every_mode_of_differentiation(mode):
    with jax.enable_x64(True):
        w, x, v = problem(batch=1)
        f = lambda x: loss(fixed_point(cell, jnp.zeros_like(x), w, x, solver=TIGHT).value)  # noqa: E731
        compute = modes(f, x, v)[mode]
        close(compute(x) if mode == "eager" else jax.jit(compute)(x), expected_of(mode), rtol=1e-8)


@pytest.mark.slow
def test_looser_adjoint_costs_less_and_errs_more():
    with jax.enable_x64(True):
        w, x, _ = problem()

        @functools.partial(jax.jit, static_argnums=2)
        @functools.partial(jax.grad, argnums=(0, 1))
        def slope(x, probe, gradient):
            return loss(fixed_point(cell, jnp.zeros_like(x), w, x, solver=TIGHT, gradient=gradient, probe=probe).value)

        (exact, _), *others = (jax.device_get(slope(x, backward_probe(), Implicit(tol=t))) for t in (None, 1e-2, 1e-6))
        (loose, tight), (few, many) = zip(*((np.abs(g - exact).max(), report[0]) for g, report in others), strict=True)
        assert tight < 1e-5 < loose and few < many


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_of_the_table_solves_a_linear_equation_within_its_limits(name):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        j, b = 0.4 * rng.normal(size=(3, 6, 6)) / 6**0.5, rng.normal(size=(3, 6))
        solver = SOLVERS[name](max_steps=2)
        assert isinstance(solver, LinearSolver) and solver.with_limits() == solver
        solver = solver.with_limits(tol=1e-9, max_steps=60)
        x, stats = jax.jit(lambda j, b: solver.solve_linear(lambda x: jnp.einsum("bij,bj->bi", j, x), b))(j, b)
        np.testing.assert_allclose(x, np.linalg.solve(np.eye(6) - j, b[:, :, None])[:, :, 0], rtol=1e-6)
        assert stats.converged.all() and 2 < stats.nfe <= 61


@pytest.mark.parametrize("solver", ["broyden", GMRES, 3])
def test_an_invalid_adjoint_solver_is_refused(solver):
    with pytest.raises(TypeError, match=r"a Solver such as Broyden\(\)"):
        Implicit(solver=solver)


def test_statistics_and_initial_guess_carry_no_gradient():
    w, x, _ = problem()

    @jax.jit
    @jax.grad
    def slope(arguments):
        x, z0 = arguments
        sol = fixed_point(cell, z0, w, jax.lax.stop_gradient(x), solver=Picard(max_steps=4))
        again = fixed_point(cell, jnp.zeros_like(x), w, x, solver=Picard(max_steps=4))
        return sol.value.sum() + again.stats.relative_residual.sum()

    jax.tree.map(lambda g: np.testing.assert_array_equal(g, jnp.zeros_like(g)), slope((x, 0.1 * x)))


def test_a_sample_that_fails_forward_does_not_change_the_gradients_of_others():
    w, x, _ = problem()

    @jax.jit
    @jax.grad
    def slope(x, poison):
        sol = fixed_point(lambda z: cell(z, w, x) * poison, jnp.zeros_like(x))
        return jnp.where(sol.stats.converged[:, None] == 1, sol.value, 0.0).sum()

    bad = np.asarray(slope(x, np.float32([[1.0], [np.nan], [1.0]])))
    good = np.asarray(slope(x, np.ones((3, 1), np.float32)))
    np.testing.assert_allclose(bad[[0, 2]], good[[0, 2]], rtol=1e-5)


def test_probe_reports_the_adjoint_solve():
    with jax.enable_x64(True):
        w, x, _ = problem()

        def total(w, probe, scale=1.0):
            sol = fixed_point(cell, jnp.zeros_like(x), w, x, solver=TIGHT, gradient=Implicit(tol=1e-5), probe=probe)
            return scale * jnp.sum(sol.value)

        g, report = jax.jit(jax.grad(total, argnums=(0, 1)))(w, backward_probe())
        assert 2 <= report[0] < TIGHT.max_steps and 0 < report[1] <= 1e-5 and report[2] == 1
        np.testing.assert_array_equal(g, jax.jit(jax.grad(total))(w, None))
        twice = jax.jit(jax.grad(lambda p: total(w, p) + total(w, p)))(backward_probe())
        np.testing.assert_allclose(twice, 2 * report)
        zero, report = jax.jit(jax.grad(functools.partial(total, scale=0.0), argnums=(0, 1)))(w, backward_probe())
        np.testing.assert_array_equal(zero, jnp.zeros_like(w))
        assert report[0] == 1 and report[1] == 0
        forward = jax.jit(lambda w: jax.jvp(lambda w: total(w, backward_probe()), (w,), (jnp.ones_like(w),))[1])(w)
        np.testing.assert_allclose(forward, jnp.sum(g), rtol=1e-4)


def test_leaves_that_do_not_depend_on_what_is_differentiated():
    with jax.enable_x64(True):

        def run(x, gradient):
            f = lambda z: {"a": 0.5 * jnp.cos(z["b"]), "b": 0.5 * jnp.sin(z["a"]) + x}  # noqa: E731
            z0 = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3))}
            return fixed_point(f, z0, solver=TIGHT, gradient=gradient).value["a"].sum()

        x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
        ours, unrolled = jax.jit(lambda x: tuple(jax.grad(run)(x, g) for g in (Implicit(), Unroll(100))))(x)
        close(ours, unrolled)


def test_unroll_is_the_plain_composition():
    w, x, _ = problem()
    sol = run(w, x, Picard(trajectory_steps=(0, 1, 7)), Unroll(2))
    z1 = np.tanh(x)
    z2, z3 = np.tanh(z1 @ w + x), np.tanh(np.tanh(z1 @ w + x) @ w + x)
    np.testing.assert_allclose(sol.value, z2, rtol=1e-5)
    np.testing.assert_allclose(sol.trajectory, [0 * x, z1, z2], rtol=1e-5)
    np.testing.assert_allclose(sol.stats.absolute_residual, np.linalg.norm(z3 - z2, axis=1), rtol=1e-4)
    assert (sol.stats.steps == 2).all() and sol.stats.nfe == 3
    by_hand = jax.jit(jax.grad(lambda w, x: loss(cell(cell(jnp.zeros_like(x), w, x), w, x)), argnums=(0, 1)))(w, x)
    close(gradients(sol), by_hand, rtol=1e-4, atol=1e-5)
    close(gradients(run(w, x, Picard(), Unroll(2, remat=True))), by_hand, rtol=1e-4, atol=1e-5)


def test_memory_of_the_gradient_does_not_grow_with_the_iterations():
    """Peak temporary bytes of the compiled gradient: only the solver's own bounded history, whatever the limit."""
    w, x, _ = problem()

    def peak(steps):
        f = lambda w: loss(fixed_point(cell, jnp.zeros_like(x), w, x, solver=Anderson(tol=0, max_steps=steps)).value)  # noqa: E731
        return jax.jit(jax.grad(f)).lower(w).compile().memory_analysis().temp_size_in_bytes

    assert peak(60) == peak(10)


def test_gmres_is_optimal_for_each_sample_and_reports_the_true_residual():
    """A rotation stops simple residual methods; a sample in an invariant plane needs two steps; restarts continue."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        rotation = np.kron(np.eye(3), [[0.0, 1.0], [-1.0, 0.0]])
        j = np.stack([np.eye(6) - rotation, 0.9 * rng.normal(size=(6, 6)) / 6**0.5, np.zeros((6, 6)), np.full((6, 6), np.nan)])
        b = rng.normal(size=(4, 6))
        solve = jax.jit(lambda j, b, s: s.solve_linear(lambda x: jnp.einsum("bij,bj->bi", j, x), b), static_argnums=2)
        x, stats = solve(jnp.asarray(j), jnp.asarray(b), GMRES(tol=1e-10))
        for i in range(3):
            np.testing.assert_allclose(x[i], np.linalg.solve(np.eye(6) - j[i], b[i]), rtol=1e-7)
        np.testing.assert_array_equal(stats.steps, [2, 6, 1, 0])
        np.testing.assert_array_equal(stats.converged, [1, 1, 1, 0])
        x, stats = solve(jnp.asarray(j), jnp.asarray(b), GMRES(tol=1e-10, restart=3, max_steps=8))
        residual = np.linalg.norm(np.einsum("bij,bj->bi", j, x) + b - x, axis=1)
        np.testing.assert_allclose(stats.absolute_residual[:3], residual[:3], atol=1e-12)
        assert stats.nfe == 9 and stats.converged[1] == 0 and stats.relative_residual[1] < 0.1


def test_an_absolute_tolerance_is_not_taken_for_a_relative_one():
    """Of a forward solver it is replaced by the default; of an adjoint solver it is refused."""
    forward = Broyden(tol=0.5, stop="absolute", max_steps=9)
    assert forward.for_linear() == Broyden(max_steps=9) and TIGHT.for_linear() == TIGHT
    with pytest.raises(ValueError, match="relative residual"):
        Implicit(forward)
    with pytest.raises(ValueError, match="for_linear"):
        forward.solve_linear(lambda x: x, jnp.ones((1, 2)))


@pytest.mark.parametrize("bad", others_slow([0, 2], [0]))
def test_the_probe_leaves_a_sample_without_an_adjoint_to_itself(bad):
    """The Jacobian of one sample is NaN at a finite equilibrium. The gradients are those without a probe."""
    w, x, _ = problem()

    def total(x, probe):
        fail = (jnp.arange(3) == bad)[:, None]
        f = lambda z: cell(z, w, x) + jnp.where(fail, jnp.sqrt(jnp.abs(z - z)), 0.0)  # noqa: E731  slope 0/0
        return loss(fixed_point(f, jnp.zeros_like(x), probe=probe).value)

    plain, (probed, report) = jax.jit(lambda x, p: (jax.grad(total)(x, None), jax.grad(total, argnums=(0, 1))(x, p)))(
        x, backward_probe()
    )
    assert np.isfinite(np.delete(probed, bad, axis=0)).all() and np.isnan(report[1])
    np.testing.assert_array_equal(probed, plain)
