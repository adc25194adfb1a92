"""Solvers: agreement with published traces, and the laws every solver keeps."""

import pathlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import Anderson, Broyden, Picard, fixed_point

REFERENCE = pathlib.Path(__file__).parent.parent / "data" / "reference" / "solvers.npz"
ALL = [Picard(damping=0.5), Anderson(), Broyden(), Broyden(line_search=True), Broyden(memory=8), Anderson(mixing=0.7, memory=3)]


def reference_problem(dtype):
    data = np.load(REFERENCE)
    w, x = jnp.asarray(data["W"], dtype), jnp.asarray(data["x"], dtype)
    return lambda z: jnp.tanh(jnp.einsum("ij,bjl->bil", w, z) + x), jnp.zeros_like(x), data


@pytest.mark.parametrize("tol,steps,key", [(0.0, 30, "tol0_n30"), (1e-3, 30, "tol1e-3_n30"), (1e-9, 80, "tol1e-9_n80")])
def test_broyden_traces_are_the_published_ones(tol, steps, key):
    """Same iterates as the reference's per-sample Broyden, which goes on iterating members that have converged."""
    with jax.enable_x64(True):
        f, z0, data = reference_problem(jnp.float64)
        ours = fixed_point(f, z0, solver=Broyden(tol=tol, max_steps=steps + 1, trace=True)).stats
        theirs = data[f"f64/td_broyden_rel_{key}/rel_trace"]
        for b in range(len(theirs)):
            last = int(ours.steps[b])
            # The reference divides by ||f|| + 1e-9.
            np.testing.assert_allclose(ours.relative_trace[b, 1 : last + 1], theirs[b, 1 : last + 1], rtol=1e-5, atol=1e-12)


def test_picard_traces_are_the_published_ones():
    with jax.enable_x64(True):
        f, z0, data = reference_problem(jnp.float64)
        ours = fixed_point(f, z0, solver=Picard(tol=0, max_steps=30, trace=True)).stats.relative_trace
        theirs = data["f64/td_fixed_point_iter_rel_tol0_n30/rel_trace"][:, 1:]
        np.testing.assert_allclose(ours.min(axis=1), theirs.min(axis=1), rtol=1e-6)


def test_anderson_goes_on_where_an_absolute_ridge_stalls():
    with jax.enable_x64(True):
        f, z0, data = reference_problem(jnp.float64)
        stats = fixed_point(f, z0, solver=Anderson(tol=1e-9, max_steps=120)).stats
        assert data["f64/td_anderson_rel_tol1e-9_n80/rel_trace"].min(axis=1).max() > 1e-4
        assert stats.converged.all() and stats.relative_residual.max() <= 1e-9


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_solution_is_a_fixed_point_with_the_stated_residual(solver):
    f, z0, _ = reference_problem(jnp.float32)
    sol = fixed_point(f, z0, solver=replace(solver, tol=1e-3, max_steps=200, trace=True))
    r, fz = f(sol.value) - sol.value, f(sol.value)
    norm = lambda x: jnp.linalg.norm(x.reshape(4, -1), axis=1)  # noqa: E731
    np.testing.assert_allclose(sol.stats.absolute_residual, norm(r), rtol=2e-3)
    np.testing.assert_allclose(sol.stats.relative_residual, norm(r) / norm(fz), rtol=2e-3)
    assert sol.stats.converged.all() and (sol.stats.relative_residual <= 1e-3).all()
    at_best = sol.stats.relative_trace[jnp.arange(4), sol.stats.steps.astype(int)]
    np.testing.assert_array_equal(at_best, sol.stats.relative_residual)
    np.testing.assert_array_equal(sol.stats.relative_trace[:, -1], sol.stats.relative_residual)


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_member_is_solved_as_if_alone(solver):
    f, z0, data = reference_problem(jnp.float32)
    w, x = jnp.asarray(data["W"], jnp.float32), jnp.asarray(data["x"], jnp.float32)
    solver = replace(solver, tol=1e-2, max_steps=100)
    together = fixed_point(f, z0, solver=solver)
    alone = fixed_point(lambda z: jnp.tanh(jnp.einsum("ij,bjl->bil", w, z) + x[2:3]), z0[2:3], solver=solver)
    np.testing.assert_allclose(together.value[2:3], alone.value, rtol=1e-4, atol=1e-5)
    assert together.stats.steps[2] == alone.stats.steps[0]


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_a_failing_member_disturbs_nobody(solver):
    f, z0, _ = reference_problem(jnp.float32)
    solver = replace(solver, tol=1e-3, max_steps=100)
    bad = fixed_point(lambda z: f(z).at[1].set(jnp.where(jnp.max(z[1]) > 0.1, jnp.nan, f(z)[1])), z0, solver=solver)
    good = fixed_point(f, z0, solver=solver)
    keep = jnp.array([0, 2, 3])
    np.testing.assert_array_equal(bad.value[keep], good.value[keep])
    assert bad.stats.converged[1] == 0 and bool(jnp.isfinite(bad.value).all())
    assert bool((bad.stats.converged[keep] == 1).all())


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_never_worse_than_the_initial_guess(solver):
    w = 3.0 * jax.random.normal(jax.random.key(0), (12, 12))  # expanding: no solver need converge
    z0 = jax.random.normal(jax.random.key(1), (5, 12))
    f = lambda z: jnp.sin(z @ w) + 1.0  # noqa: E731
    stats = fixed_point(f, z0, solver=replace(solver, max_steps=20, trace=True)).stats
    assert (stats.relative_residual <= stats.relative_trace[:, 0]).all()
    assert stats.nfe <= 20


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_solved_at_the_start_costs_one_evaluation(solver):
    sol = fixed_point(lambda z: 0.5 * z, jnp.zeros((3, 4)), solver=solver)
    assert sol.stats.nfe == 1 and sol.stats.converged.all() and (sol.stats.steps == 0).all()


@pytest.mark.parametrize("solver", [Broyden(), Anderson(), Broyden(line_search=True)], ids=repr)
def test_solves_what_picard_cannot(solver):
    """Spectral radius 2: plain iteration diverges."""
    with jax.enable_x64(True):
        f = lambda z: -2.0 * jnp.tanh(z) + jnp.array([[0.3, 1.0, -0.5, 2.0]])  # noqa: E731
        z0 = jnp.zeros((1, 4))
        assert fixed_point(f, z0, solver=replace(solver, tol=1e-10)).stats.converged.all()
        assert not fixed_point(f, z0, solver=Picard(tol=1e-10)).stats.converged.all()


def test_line_search_never_lets_the_accepted_residual_grow():
    with jax.enable_x64(True):
        f = lambda z: z - (jnp.arctan(3.0 * z) + 0.1 * z)  # noqa: E731  far from the root a full step overshoots
        z0 = jnp.full((1, 1), 3.0)
        plain = fixed_point(f, z0, solver=Broyden(max_steps=25, stop="absolute", tol=1e-9, trace=True)).stats
        searched = fixed_point(f, z0, solver=Broyden(max_steps=25, stop="absolute", tol=1e-9, line_search=True)).stats
        assert searched.converged.all()
        assert searched.nfe <= plain.nfe or not plain.converged.all()


def test_absolute_stop_looks_at_the_absolute_residual():
    f = lambda z: 0.5 * z + 100.0  # noqa: E731
    stats = fixed_point(f, jnp.zeros((2, 3)), solver=Picard(tol=1.0, stop="absolute")).stats
    assert stats.converged.all() and (stats.absolute_residual <= 1.0).all() and (stats.absolute_residual > 0.1).all()


def test_step_limit_can_be_traced():
    f, z0, _ = reference_problem(jnp.float32)
    run = jax.jit(lambda limit: fixed_point(f, z0, solver=Broyden(tol=0, max_steps=12), max_steps=limit).stats.nfe)
    assert [int(run(n)) for n in (3, 7, 99)] == [3, 7, 12]
    assert run._cache_size() == 1


def test_any_pytree_of_states_is_one_problem():
    def f(z):
        return {"a": jnp.cos(z["b"][:, :3]), "b": 0.5 * jnp.sin(jnp.tile(z["a"], (1, 2)))}

    z0 = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 6))}
    sol = fixed_point(f, z0, solver=Broyden(tol=1e-5))
    assert sol.stats.converged.all()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), f(sol.value), sol.value)


def test_bfloat16_states_are_iterated_in_float32():
    f = lambda z: (0.5 * jnp.tanh(z) + 1).astype(jnp.bfloat16)  # noqa: E731
    sol = fixed_point(f, jnp.zeros((2, 8), jnp.bfloat16), solver=Anderson(tol=5e-3))
    assert sol.value.dtype == jnp.bfloat16 and sol.stats.relative_residual.dtype == jnp.float32
    assert sol.stats.converged.all()


@pytest.mark.parametrize(
    "f,z0,message",
    [
        (lambda z: z[:, :2], jnp.zeros((2, 3)), "float32[2, 2]"),
        (lambda z: z.astype(jnp.bfloat16), jnp.zeros((2, 3)), "bfloat16"),
        (lambda z: {"a": z["a"], "b": z["b"][:1]}, {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 1))}, "['b']"),
        (lambda z: (z,), jnp.zeros((2, 3)), "structure"),
        (lambda z: z, jnp.zeros((2, 3), jnp.int32), "real floating"),
        (lambda z: z, jnp.zeros((2, 3), jnp.complex64), "real floating"),
        (lambda z: z, jnp.zeros(()), "batch axis"),
        (lambda z: z, (jnp.zeros((2, 3)), jnp.zeros((3, 3))), "batch size"),
    ],
)
def test_what_cannot_be_a_fixed_point_problem_is_refused(f, z0, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        fixed_point(f, z0)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Broyden(stop="rel"), "'relative' or 'absolute'"),
        (lambda: Picard(damping=0.0), "damping"),
        (lambda: Anderson(memory=0), "memory"),
        (lambda: Anderson(max_steps=0), "max_steps"),
        (lambda: Broyden(tol=-1.0), "tol"),
        (lambda: Broyden(memory=1), "memory"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
