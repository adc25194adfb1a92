"""Gradients other than the implicit one, each against its formula in dense numpy."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import SHINE, Broyden, Implicit, JacobianFree, Neumann, PhantomGradient, Picard, Reversible, Unroll, fixed_point
from deq_flax.equilibrium.gradients.base import attach, stopped
from deq_flax.equilibrium.loop import solve, solve_with_state
from deq_flax.equilibrium.solvers.broyden import apply_inverse_transpose
from tests.cases import others_slow
from tests.equilibrium.dense import LOOSE, TIGHT, adjoint, cell, close, gradients, loss, problem, run


def series(terms, r=1.0):
    """Return the direction r sum_{i<terms} (r J^T + (1 - r) I)^i v."""

    def direction(j, v):
        powers = [v]
        for _ in range(terms - 1):
            powers.append(r * j.T @ powers[-1] + (1 - r) * powers[-1])
        return r * np.sum(powers, axis=0)

    return direction


THEORY = {
    Neumann(3): series(3),
    Neumann(40): series(40),
    JacobianFree(): lambda j, v: v,
    Neumann(4, 0.3): series(4, 0.3),
    PhantomGradient(4, 0.3): series(4, 0.3),
}


@pytest.mark.parametrize("gradient", THEORY, ids=repr)
def test_truncated_series_is_the_dense_one(gradient):
    with jax.enable_x64(True):
        w, x, _ = problem()
        result = run(w, x, TIGHT, gradient)
        close(gradients(result), adjoint(w, x, result.value, THEORY[gradient]), rtol=1e-8)


def test_long_series_is_the_implicit_gradient():
    with jax.enable_x64(True):
        w, x, _ = problem()
        exact = gradients(run(w, x, TIGHT, Implicit()))
        long, three, one = (error(gradients(run(w, x, TIGHT, Neumann(terms))), exact) for terms in (200, 3, 1))
        assert long < 1e-9 < 1e-3 < three < one


def test_jacobian_free_is_the_series_of_one_term():
    """Bit for bit, away from the fixed point too."""
    w, x, _ = problem()
    for solver in (LOOSE, Picard(max_steps=2)):
        one, free = (gradients(run(w, x, solver, gradient)) for gradient in (Neumann(1), JacobianFree()))
        jax.tree.map(np.testing.assert_array_equal, one, free)


def test_phantom_gradient_is_that_of_its_own_steps():
    """Away from the fixed point, where the Neumann form differs: the solve is cut off after two evaluations."""
    with jax.enable_x64(True):
        w, x, _ = problem()
        short = Picard(max_steps=2)
        result = run(w, x, short, PhantomGradient(3, 0.3))

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def by_hand(w, x):
            z = result.value
            for _ in range(3):
                z = 0.7 * z + 0.3 * cell(z, w, x)
            return jnp.vdot(jnp.cos(result.value) * jnp.arange(1.0, 7.0)[None], z)

        np.testing.assert_allclose(result.value, np.tanh(x), rtol=1e-12)
        close(gradients(result), by_hand(w, x))
        neumann = run(w, x, short, Neumann(3, 0.3))
        assert np.abs(gradients(neumann)[1] - gradients(result)[1]).max() > 1e-3


def dense_broyden(w, x, tol):
    """Run Broyden's method on one sample with a dense H, as in a textbook: z* and H."""
    z, h = np.zeros(6), -np.eye(6)
    g = np.tanh(z @ w + x) - z
    while np.linalg.norm(g) > tol * np.linalg.norm(g + z):
        s = -h @ g
        z, before = z + s, g
        g = np.tanh(z @ w + x) - z
        h_y = h @ (g - before)
        h = h + np.outer(s - h_y, s @ h) / (s @ h_y)
    return z, h


@pytest.mark.parametrize("gradient", [SHINE(), SHINE(fallback=0.8), SHINE(refine_steps=12)], ids=repr)
def test_shine_uses_the_transposed_inverse_of_the_forward_solver(gradient):
    """Samples stop after different steps: each has the H of its own last one."""
    with jax.enable_x64(True):
        w, x, _ = problem()
        w, x, tol = 1.4 * w, x * np.array([[0.1], [1.0], [3.0]]), 1e-5
        result = run(w, x, Broyden(tol=tol), gradient)
        assert len(set(result.stats.steps.tolist())) == 3
        inverses = iter(dense_broyden(np.asarray(w), np.asarray(x[b]), tol)[1] for b in range(3))
        fell_back = []

        def direction(j, v):
            shared = -next(inverses).T @ v
            if gradient.refine_steps:
                return np.linalg.solve(np.eye(6) - j.T, v)
            longer = gradient.fallback is not None and np.linalg.norm(shared) > gradient.fallback * np.linalg.norm(v)
            fell_back.append(longer)
            return v if longer else shared

        expected = adjoint(w, x, result.value, direction)
        close(
            gradients(result),
            expected,
            rtol=1e-3 if gradient.refine_steps else 1e-7,
            atol=1e-4 if gradient.refine_steps else 1e-8,
        )
        assert gradient.fallback == 1.3 or len(set(fell_back)) == 2, "one sample falls back and another does not"


@pytest.mark.parametrize("solver", [Broyden(memory=5), Broyden(line_search=True)], ids=["memory=5", "line_search"])
def test_transposed_inverse_is_that_of_the_step_taken(solver):
    """The step after the last evaluation, -H g, equals the one computed from H^T applied to the basis vectors."""
    with jax.enable_x64(True):
        w, x, _ = problem()
        solver = replace(solver, tol=0.0, max_steps=9, trajectory_steps=(8,))

        @jax.jit
        def both(w, x):
            f = lambda z: cell(z, w, x)  # noqa: E731
            _, stats, state = solve_with_state(f, jnp.zeros_like(x), solver)
            columns = [apply_inverse_transpose(state, jnp.broadcast_to(e, x.shape)) for e in jnp.eye(6)]
            z = stats.trajectory[0]
            return state.scale * state.pending, -jnp.einsum("ebn,bn->be", jnp.stack(columns), f(z) - z)

        pending, by_transpose = both(w, x)
        np.testing.assert_allclose(by_transpose, pending, rtol=1e-6)


def plain_reversible(w, x, steps, b, best):
    """Return the iterates w_best, (B, N), of the two-step form, to be differentiated straight through."""
    before = at = jnp.zeros_like(x)
    out = jnp.zeros_like(x)
    for k in range(steps):
        out = jnp.where((best == k)[:, None], at, out)
        before, at = at, (1 - b) * before + b * cell(at, w, x)
    return out


def error(a, b):
    return max(float(np.linalg.norm(p - q) / np.linalg.norm(q)) for p, q in zip(a, b, strict=True))


def test_reversible_is_the_gradient_of_its_own_steps():
    """Exact to rounding in float64, and in float32 with checkpoints but not without. Samples stop at different steps."""
    with jax.enable_x64(True):
        w, x, _ = problem()
        x = x * np.array([[0.0], [1.0], [3.0]])
        w32, x32 = w.astype(np.float32), x.astype(np.float32)
        solver = Picard(tol=1e-5, max_steps=20)
        kept, constant = (run(w, x, solver, Reversible(0.8, every)) for every in (8, None))
        best = kept.stats.steps
        assert best[0] == 0 and 1 < best[1] != best[2] < 19
        f = lambda w, x: loss(plain_reversible(w, x, 20, 0.8, best))  # noqa: E731
        by_hand = jax.device_get(jax.jit(jax.grad(f, argnums=(0, 1)))(w, x))
        assert error(gradients(kept), by_hand) < 1e-12 and error(gradients(constant), by_hand) < 1e-10
        single = [error(gradients(run(w32, x32, solver, Reversible(0.8, every))), by_hand) for every in (8, None)]
        assert single[0] < 1e-6 and single[1] > 5 * single[0], single


def test_reversible_uses_neither_memory_for_steps_nor_steps_after_the_best():
    w, x, _ = problem()

    def peak(steps, every):
        solver = Picard(tol=0, max_steps=steps)
        f = lambda w: loss(fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=Reversible(0.5, every)).value)  # noqa: E731
        return jax.jit(jax.grad(f)).lower(w).compile().memory_analysis().temp_size_in_bytes

    assert peak(80, None) == peak(16, None)
    assert peak(80, 8) - peak(16, 8) <= 2 * 8 * 2 * x.nbytes  # 8 more pairs of states, in the solve and in what is kept


ALL = [Neumann(), PhantomGradient(), SHINE(), Reversible()]


@pytest.mark.parametrize("gradient", ALL, ids=repr)
@pytest.mark.slow
def test_inside_vmap_scan_and_checkpoint(gradient):
    """With a traced integer that f closes over; the sum over a batch or a scan equals that of single gradients.

    In float64: SHINE's estimate depends on the number of steps, and in float32 rounding can decide whether a residual is
    below the tolerance.
    """
    with jax.enable_x64(True):
        w, x, _ = problem(batch=2)
        table = jnp.asarray(np.stack([x, 2 * x]))

        def slope(w, i):
            f = lambda z: {"a": cell(z["b"], w, table[i])[:, :2], "b": cell(z["b"], w, table[i])}  # noqa: E731
            z0 = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((2, 6))}
            total = lambda sol: sol.value["a"].sum() + loss(sol.value["b"])  # noqa: E731
            return total(fixed_point(f, z0, solver=Broyden(max_steps=12), gradient=gradient))

        i = jnp.arange(2)

        @jax.jit
        def ways(w):
            scanned = lambda w: jax.lax.scan(lambda c, i: (c + jax.checkpoint(slope)(w, i), None), 0.0, i)[0]  # noqa: E731
            return jax.vmap(jax.grad(slope), (None, 0))(w, i).sum(0), jax.grad(scanned)(w)

        @jax.jit
        def one_by_one(w):
            f = lambda w, i: jax.grad(slope)(w, i)  # noqa: E731
            return f(w, 0) + f(w, 1)

        for way in ways(w):
            close(way, one_by_one(w), rtol=1e-8)


@pytest.mark.parametrize("gradient", [Neumann(), PhantomGradient()], ids=lambda g: type(g).__name__)
def test_forward_mode_is_the_transpose_of_reverse_mode(gradient):
    with jax.enable_x64(True):
        w, x, v = problem()
        f = lambda x: loss(fixed_point(cell, jnp.zeros_like(x), w, x, solver=TIGHT, gradient=gradient).value)  # noqa: E731
        pushed = jax.jit(lambda x: jax.jvp(f, (x,), (v,))[1])(x)
        np.testing.assert_allclose(pushed, np.vdot(gradients(run(w, x, TIGHT, gradient))[1], v), rtol=1e-10)


@pytest.mark.slow
def test_hessian_vector_product_through_reversible():
    with jax.enable_x64(True):
        w, x, v = problem()
        solver = Picard(tol=0, max_steps=10)
        ours = lambda x: loss(fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=Reversible()).value)  # noqa: E731
        best = run(w, x, solver, Reversible()).stats.steps
        plain = lambda x: loss(plain_reversible(w, x, 10, 0.5, best))  # noqa: E731
        product = lambda f: jax.jit(lambda x: jax.jvp(jax.grad(f), (x,), (v,))[1])(x)  # noqa: E731
        close(product(ours), product(plain))


@pytest.mark.parametrize("gradient", [SHINE(), Reversible()], ids=lambda g: type(g).__name__)
def test_forward_mode_is_refused_where_it_is_not_offered(gradient):
    f = lambda x: fixed_point(lambda z: 0.5 * z + x, jnp.zeros_like(x), gradient=gradient).value  # noqa: E731
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda x: jax.jvp(f, (x,), (x,))).lower(np.ones((1, 2), np.float32))


EVERY = [Implicit(), *ALL, JacobianFree(), Unroll(50)]


@pytest.mark.parametrize("gradient", others_slow(EVERY, [Implicit(), SHINE(), Unroll(50)]), ids=lambda g: type(g).__name__)
def test_value_dtype_and_statistics_are_those_of_the_solver(gradient):
    """With a bfloat16 leaf, a float32 leaf and a probe. But for Unroll and Reversible, the value is the same bit for bit."""
    x = np.float32([[0.3, -1.0, 2.0]])

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(arguments, gradient):
        x, probe = arguments
        f = lambda z: {"a": 0.5 * jnp.tanh(z["a"]) + x, "b": (0.5 * z["b"] + 1).astype(jnp.bfloat16)}  # noqa: E731
        z0 = {"a": jnp.zeros_like(x), "b": jnp.zeros((1, 2), jnp.bfloat16)}
        sol = fixed_point(f, z0, solver=Broyden(tol=1e-4), gradient=gradient, probe=probe)
        return sol.value["a"].sum() + sol.stats.relative_residual.sum(), sol

    (_, sol), (slope, report) = jax.device_get(total((x, np.zeros(3, np.float32)), gradient))
    (_, plain), _ = jax.device_get(total((x, np.zeros(3, np.float32)), Neumann(2)))
    assert sol.value["b"].dtype == jnp.bfloat16 and slope.dtype == x.dtype and sol.stats.converged.all()
    assert report[2] == (type(gradient) is Implicit)
    if not isinstance(gradient, Unroll | Reversible):
        jax.tree.map(np.testing.assert_array_equal, (sol.value, sol.stats), (plain.value, plain.stats))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Unroll(0), "steps"),
        (lambda: Neumann(0), "terms"),
        (lambda: PhantomGradient(0), "steps"),
        (lambda: Neumann(relaxation=0.0), "relaxation"),
        (lambda: Neumann(relaxation=1.5), "relaxation"),
        (lambda: PhantomGradient(relaxation=0.0), "relaxation"),
        (lambda: Reversible(1.0), "relaxation"),
        (lambda: Reversible(checkpoint_every=0), "checkpoint_every"),
        (lambda: SHINE(refine_steps=-1), "refine_steps"),
        (lambda: SHINE(fallback=0.0), "fallback"),
        (lambda: fixed_point(jnp.tanh, jnp.zeros((1, 2)), solver=Picard(), gradient=SHINE()), "not Picard"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_new_gradient_is_a_dataclass_with_one_method():
    @dataclass(frozen=True)
    class Scaled:
        """The Jacobian-free gradient times a factor."""

        factor: float = 2.0

        def __call__(self, f, x0, solver, max_steps, probe):
            x, stats = solve(stopped(f), x0, solver, max_steps)
            return attach(x, self.factor * f(x)), stats

    w, x, _ = problem()
    close(gradients(run(w, x, LOOSE, Scaled())), tuple(2 * g for g in gradients(run(w, x, LOOSE, JacobianFree()))), rtol=1e-5)
