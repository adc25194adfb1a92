"""Solvers: agreement with published traces, and laws that hold for every solver on every problem of the table."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import GMRES, Anderson, Broyden, Picard, fixed_point
from deq_flax.equilibrium.solvers.anderson import AndersonState, _restarted
from tests.cases import others_slow
from tests.equilibrium.problems import (
    NAMES,
    RECORDED,
    SOLVERS,
    TABLE,
    HeavyBall,
    name,
    solved,
    solved_alone,
    solved_thousand,
    value_of,
)

REFERENCE = pathlib.Path(__file__).parent.parent / "data" / "reference" / "solvers.npz"
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=name)


def reference_problem(dtype):
    data = np.load(REFERENCE)
    w, x = (np.asarray(data[name], dtype) for name in ("W", "x"))
    return lambda z: jnp.tanh(jnp.einsum("ij,bjl->bil", w, z) + x), jnp.zeros_like(x), data


@pytest.mark.parametrize("tol,steps,key", [(0.0, 30, "tol0_n30"), (1e-3, 30, "tol1e-3_n30"), (1e-9, 80, "tol1e-9_n80")])
def test_broyden_traces_are_the_published_ones(tol, steps, key):
    """Same iterates as the reference's per-sample Broyden, which goes on iterating samples that have converged."""
    with jax.enable_x64(True):
        f, z0, data = reference_problem(jnp.float64)
        solver = Broyden(tol=tol, max_steps=steps + 1, trace=True)
        ours = jax.device_get(jax.jit(lambda z0: fixed_point(f, z0, solver=solver).stats)(z0))
        theirs = data[f"f64/td_broyden_rel_{key}/rel_trace"]
        for b in range(len(theirs)):
            last = int(ours.steps[b])
            # The reference divides by ||f|| + 1e-9.
            np.testing.assert_allclose(ours.relative_trace[b, 1 : last + 1], theirs[b, 1 : last + 1], rtol=1e-5, atol=1e-12)


def test_picard_traces_are_the_published_ones():
    with jax.enable_x64(True):
        f, z0, data = reference_problem(jnp.float64)
        solver = Picard(tol=0, max_steps=30, trace=True)
        ours = np.asarray(jax.jit(lambda z0: fixed_point(f, z0, solver=solver).stats.relative_trace)(z0))
        theirs = data["f64/td_fixed_point_iter_rel_tol0_n30/rel_trace"][:, 1:]
        np.testing.assert_allclose(ours.min(axis=1), theirs.min(axis=1), rtol=1e-6)


def test_anderson_goes_on_where_an_absolute_ridge_stalls():
    with jax.enable_x64(True):
        f, z0, data = reference_problem(jnp.float64)
        run = jax.jit(lambda z0: fixed_point(f, z0, solver=Anderson(tol=1e-9, max_steps=120)).stats)
        stats = jax.device_get(run(z0))
        assert data["f64/td_anderson_rel_tol1e-9_n80/rel_trace"].min(axis=1).max() > 1e-4
        assert stats.converged.all() and stats.relative_residual.max() <= 1e-9


@every_solver
def test_residual_is_that_of_the_returned_iterate(solver):
    sol = solved(solver)
    for i, problem in enumerate(TABLE.values()):
        z, fz = sol.value[i], value_of(problem, sol.value[i])
        absolute, size = np.linalg.norm(fz - z), np.linalg.norm(fz)
        np.testing.assert_allclose(sol.stats.absolute_residual[i], absolute, rtol=1e-5, atol=1e-12)
        if size > 0:
            np.testing.assert_allclose(sol.stats.relative_residual[i], absolute / size, rtol=1e-5, atol=1e-12)


@every_solver
def test_converged_means_that_the_residual_is_within_tolerance(solver):
    stats = solved(solver).stats
    np.testing.assert_array_equal(stats.converged == 1, stats.relative_residual <= solver.tol)
    impossible = [i for i, problem in enumerate(TABLE.values()) if not problem.solvable]
    assert (stats.converged[impossible] == 0).all() and stats.nfe <= solver.max_steps


@every_solver
def test_trace_leads_to_the_answer_and_nothing_in_it_is_better(solver):
    stats = solved(solver).stats
    samples, trace = np.arange(len(TABLE)), stats.relative_trace
    np.testing.assert_array_equal(trace[samples, stats.steps.astype(int)], stats.relative_residual)
    np.testing.assert_array_equal(
        trace[:, -1] if stats.nfe < solver.max_steps else stats.relative_residual, stats.relative_residual
    )
    sound = np.array([n != "NaN at the start" for n in NAMES])
    assert (stats.relative_residual[stats.converged == 1] <= solver.tol).all()
    with np.errstate(divide="ignore", invalid="ignore"):
        size = stats.absolute_trace / trace
        rank = stats.absolute_trace / np.fmax(size, size[:, :1])
    rank = np.where(np.isnan(rank), np.inf, rank)
    searching = sound & (stats.converged == 0)
    best = rank[samples, stats.steps.astype(int)]
    assert searching.any() and (best <= rank.min(axis=1) * (1 + 1e-12))[searching].all()  # so never worse than the start
    np.testing.assert_array_equal(solved(solver).value[~sound], [TABLE["NaN at the start"].start])


@every_solver
def test_trajectory_holds_the_iterates_of_the_trace(solver):
    sol = solved(solver)
    assert sol.trajectory.shape == (len(RECORDED), *sol.value.shape)
    for k, at in zip(RECORDED, sol.trajectory, strict=True):
        for i, problem in enumerate(TABLE.values()):
            absolute = np.linalg.norm(value_of(problem, at[i]) - at[i])
            np.testing.assert_allclose(sol.stats.absolute_trace[i, k], absolute, rtol=1e-5, atol=1e-10)


@every_solver
def test_a_sample_is_solved_as_if_alone(solver):
    together = solved(solver)
    for i, problem in enumerate(TABLE.values()):
        alone = solved_alone(solver, problem)
        np.testing.assert_array_equal(together.stats.converged[i], alone.stats.converged[0])
        if alone.stats.converged[0]:
            assert together.stats.steps[i] == alone.stats.steps[0]
            np.testing.assert_allclose(together.value[i], alone.value[0], rtol=1e-6, atol=1e-9)


@every_solver
def test_samples_without_a_solution_do_not_affect_the_others(solver):
    solvable = [i for i, problem in enumerate(TABLE.values()) if problem.solvable]
    with_them, without = solved(solver), solved(solver, healthy=True)
    np.testing.assert_array_equal(with_them.value[solvable], without.value[solvable])
    assert np.isfinite(with_them.value).all()


@every_solver
def test_solved_at_the_start_costs_no_step(solver):
    i = NAMES.index("solved at the start")
    assert solved(solver).stats.steps[i] == 0 and solved_alone(solver, TABLE[NAMES[i]]).stats.nfe == 1


def test_broyden_solves_all_that_can_be_solved():
    solver = next(s for s in SOLVERS if name(s) == "Broyden")
    stats = solved(solver).stats
    assert all(stats.relative_residual[i] <= 1e-6 for i, problem in enumerate(TABLE.values()) if problem.solvable)


def test_spectral_radius_two_is_too_much_for_plain_iteration_only():
    i = NAMES.index("spectral radius 2 at the start")
    assert all(solved(solver).stats.converged[i] for solver in SOLVERS)
    assert not solved_alone(Picard(max_steps=50), TABLE[NAMES[i]]).stats.converged[0]


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_a_thousand_samples_reach_the_floor_of_float32_and_report_it(solver):
    stats = solved_thousand(solver(tol=1e-9, max_steps=24)).stats
    assert (stats.relative_residual < 5e-7).all()
    np.testing.assert_array_equal(stats.converged == 1, stats.relative_residual <= 1e-9)
    assert 0 < stats.converged.mean() < 1


@functools.cache
def spectrum(low, high):
    """The map of four linear problems of 32 elements, symmetric with eigenvalues in an interval, both ends among them."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(4, 32, 32)))[0]
    eigenvalues = np.concatenate([rng.uniform(low, high, (4, 30)), np.full((4, 1), low), np.full((4, 1), high)], axis=1)
    matrices, shifts = (q * eigenvalues[:, None]) @ q.transpose(0, 2, 1), rng.normal(size=(4, 32))
    return lambda z: jnp.einsum("bij,bj->bi", matrices, z) + shifts


def share_solved(solver, low, high):
    with jax.enable_x64(True):
        run = jax.jit(lambda z0: fixed_point(spectrum(low, high), z0, solver=solver).stats.converged)
        return float(run(np.zeros((4, 32))).mean())


def test_anderson_with_restarts_solves_what_a_sliding_window_does_not():
    solvers = [Anderson(tol=1e-8, max_steps=100, restart=restart) for restart in (True, False)]
    restarted, sliding = (share_solved(solver, -0.99, 0.99) for solver in solvers)
    assert restarted == 1.0 and sliding < 0.5


@pytest.mark.parametrize("low,high", [(-8.0, 0.5), (-0.9, 0.9)])
def test_bounded_broyden_solves_what_takes_many_times_its_memory(low, high):
    """The first needs H_0 of the right size, the second what the reductions keep."""
    assert share_solved(Broyden(tol=1e-8, max_steps=100, memory=8), low, high) == 1.0


def test_adaptive_relaxation_is_right_for_each_sample():
    """Eigenvalues from -8: plain iteration diverges, and relaxation 0.05, which a fixed one would need, is too slow."""
    options = {"tol": 1e-8, "max_steps": 100}
    solvers = [Picard(adaptive=True, **options), Picard(**options), Picard(relaxation=0.1, **options)]
    assert [share_solved(solver, -8.0, 0.0) for solver in solvers] == [1.0, 0.0, 0.0]


def test_a_restart_of_anderson_keeps_leading_directions_on_the_way_down_and_else_the_newest_third():
    """Of sample 0 the newest residual is the smallest, of sample 1 the largest. NumPy's SVD says which directions lead."""
    random = np.random.default_rng(0)
    matrix, shift = random.normal(size=(32, 32)) / 8, random.normal(size=32)
    z = random.normal(size=(2, 10, 32)) * np.geomspace(2, 1, 10)[:, None]
    z[1] = z[1, ::-1]
    fz = z @ matrix + shift
    g = fz - z
    scales = 2.0 ** random.integers(-3, 3, (2, 10))
    units = g / scales[:, :, None]
    with jax.enable_x64(True):
        full = AndersonState(fz, units, units @ units.swapaxes(1, 2), scales)
        relaxed, residuals, gram, scales = jax.device_get(jax.jit(_restarted, static_argnums=1)(full, None))
    np.testing.assert_allclose(gram[:, :7, :7], residuals[:, :7] @ residuals[:, :7].swapaxes(1, 2), rtol=1e-12)
    residuals = residuals * scales[:, :, None]
    # Each is an iterate and its f still, for this f is affine.
    np.testing.assert_allclose((relaxed - residuals)[:, :7] @ matrix + shift, relaxed[:, :7], rtol=0, atol=1e-10)
    np.testing.assert_allclose(relaxed[0, 6], fz[0, 9])
    np.testing.assert_array_equal(relaxed[1, :7], fz[1, [6, 6, 6, 6, 7, 8, 9]])

    def correction(relaxed, residuals):
        """The map from the newest residual to the correction of the newest iterate."""
        return (relaxed[:-1] - relaxed[-1]).T @ np.linalg.pinv((residuals[:-1] - residuals[-1]).T)

    u, s, vt = np.linalg.svd(correction(fz[0], g[0]))
    np.testing.assert_allclose(correction(relaxed[0, :7], residuals[0, :7]), (u[:, :6] * s[:6]) @ vt[:6], atol=1e-8)


def test_every_third_step_restarts_an_anderson_that_keeps_seven_of_ten():
    solver = Anderson(memory=10, restart=True, max_steps=20)
    state, step, restarts = solver.init(jnp.zeros((1, 4))), jax.jit(solver.step), []
    for k in range(17):
        g = jnp.full((1, 4), 2.0**-k)
        _, state = step(jnp.asarray(k), jnp.full((1, 4), float(k)), g, state)
        if np.all(state.relaxed[0, 6] == k + 2.0**-k) and k > 6:  # the newest, behind six directions
            restarts.append(k)
    assert restarts == [9, 12, 15]


@pytest.mark.parametrize("memory", others_slow([1, 2], [1]))
def test_a_restart_that_keeps_the_newest_alone_is_the_sliding_window(memory):
    """With one slot nothing is ever combined, with two the newest is kept."""
    f, z0, _ = reference_problem(jnp.float32)
    restarted, sliding = (
        fixed_point(f, z0, solver=Anderson(memory=memory, restart=restart, tol=0.0, max_steps=8)).value
        for restart in (True, False)
    )
    np.testing.assert_allclose(restarted, sliding, rtol=0, atol=1e-6)


def test_anderson_with_restarts_solves_rotations_in_fewer_evaluations():
    """Eigenvalues 1.1 exp(+-i a) at 16 angles a: plain iteration diverges, and they span three times the memory."""
    random = np.random.default_rng(0)
    q = np.linalg.qr(random.normal(size=(32, 32)))[0]
    angles = random.uniform(0.3 * np.pi, np.pi, 16)
    blocks = np.zeros((32, 32))
    for i, a in enumerate(angles):
        blocks[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = 1.1 * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    matrix, shift = q @ blocks @ q.T, random.normal(size=32)
    with jax.enable_x64(True):
        solvers = [Anderson(tol=1e-8, max_steps=100, memory=10, restart=restart) for restart in (True, False)]
        run = jax.jit(lambda z0, s: fixed_point(lambda z: z @ matrix + shift[None], z0, solver=s).stats, static_argnums=1)
        restarted, sliding = (run(np.zeros((1, 32)), solver) for solver in solvers)
        assert restarted.converged.all() and restarted.nfe <= 55 and sliding.nfe >= 75


def test_line_search_halves_a_step_that_raises_the_residual_too_far():
    """On one element, where iterates are easily followed. Without the search it takes longer."""
    with jax.enable_x64(True):
        f = lambda z: z - (jnp.exp(z) - 2)  # noqa: E731  a full step overshoots
        options = {"max_steps": 40, "stop": "absolute", "tol": 1e-9, "trace": True, "trajectory_steps": tuple(range(40))}
        solve = jax.jit(lambda z0, s: fixed_point(f, z0, solver=Broyden(line_search=s, **options)), static_argnums=1)
        plain, searched = (jax.device_get(solve(np.full((1, 1), -3.0), s)) for s in (False, True))
        residual, z = searched.stats.absolute_trace[0], searched.trajectory[:, 0, 0]
        accepted, halvings = [0], 0
        for k in range(1, int(searched.stats.steps[0])):
            if residual[k] <= 10 * residual[accepted].max():
                accepted.append(k)
            else:
                halvings += 1
                np.testing.assert_allclose(z[k + 1], (z[accepted[-1]] + z[k]) / 2, rtol=1e-12)
        assert searched.stats.converged.all() and halvings > 0
        assert searched.stats.steps[0] < plain.stats.steps[0]


@pytest.mark.slow
def test_line_search_solves_what_unit_steps_solve_and_where_they_overshoot():
    """On linear problems with cond(I - J) = 1000, not symmetric, and on z = c - A exp(z), where long steps overshoot."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(2, 20, 12, 12)))[0]
    stiff = np.eye(12) - (q[0] * np.logspace(-3, 0, 12)) @ q[1]
    steep = -np.linspace(1, 10, 20)[:, None, None] * (np.eye(12) + 0.2 * rng.normal(size=(20, 12, 12)) / 12**0.5)
    matrices, exp = np.concatenate([stiff, steep]), np.arange(40)[:, None] >= 20
    shift = np.where(exp, 3.0, 1.0) * rng.normal(size=(40, 12))
    f = lambda z: jnp.einsum("bij,bj->bi", matrices, jnp.where(exp, jnp.exp(z), z)) + shift  # noqa: E731
    with jax.enable_x64(True):
        solvers = [Broyden(tol=1e-8, max_steps=150, line_search=search) for search in (False, True)]
        run = jax.jit(lambda z0: [fixed_point(f, z0, solver=solver).stats.converged for solver in solvers])
        unit, searched = (np.asarray(converged).reshape(2, 20).sum(axis=1) for converged in run(np.zeros((40, 12))))
    assert unit[0] == searched[0] == 20 and searched[1] > unit[1]
    unit, searched = (solved(s).stats.converged for s in SOLVERS if name(s) in ("Broyden", "Broyden line_search=True"))
    assert "cond(I - J) = 1000" in NAMES and (searched >= unit).all()


def test_absolute_stop_looks_at_the_absolute_residual():
    f = lambda z: 0.5 * z + 100.0  # noqa: E731
    run = jax.jit(lambda z0: fixed_point(f, z0, solver=Picard(tol=1.0, stop="absolute")).stats)
    stats = jax.device_get(run(np.zeros((2, 3), np.float32)))
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
    sol, again = jax.jit(lambda z0: (sol := fixed_point(f, z0, solver=Broyden(tol=1e-5)), f(sol.value)))(z0)
    assert sol.stats.converged.all()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), again, sol.value)


def test_bfloat16_states_are_iterated_in_float32():
    f = lambda z: (0.5 * jnp.tanh(z) + 1).astype(jnp.bfloat16)  # noqa: E731
    sol = jax.jit(lambda z0: fixed_point(f, z0, solver=Anderson(tol=5e-3)))(np.zeros((2, 8), jnp.bfloat16))
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
def test_a_malformed_problem_is_refused(f, z0, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        fixed_point(f, z0)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Broyden(stop="rel"), "'relative' or 'absolute'"),
        (lambda: Picard(relaxation=0.0), "relaxation"),
        (lambda: Anderson(memory=0), "memory"),
        (lambda: Anderson(max_steps=0), "max_steps"),
        (lambda: Broyden(tol=-1.0), "tol"),
        (lambda: Broyden(memory=1), "memory"),
        (lambda: Picard(trajectory_steps=(4, 2)), "increasing"),
        (lambda: Picard(trajectory_steps=(50,)), "below 50"),
        (lambda: Picard(trajectory_steps=[1]), "tuple"),
        (lambda: GMRES(restart=0), "restart"),
        (lambda: GMRES(max_steps=0), "max_steps"),
        (lambda: GMRES(tol=-1.0), "tol"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_anything_but_a_forward_solver_is_refused():
    with pytest.raises(TypeError, match=r"Implicit\(solver=GMRES"):
        fixed_point(jnp.tanh, jnp.zeros((1, 2)), solver=GMRES())
    with pytest.raises(TypeError, match="must be a Solver"):
        fixed_point(jnp.tanh, jnp.zeros((1, 2)), solver="broyden")
    with pytest.raises(TypeError, match="must be a Solver"):
        fixed_point(jnp.tanh, jnp.zeros((1, 2)), solver=Broyden)


def test_a_new_solver_is_a_dataclass_with_two_methods():
    problem = TABLE["contractive"]
    mine, plain = (solved_alone(solver(max_steps=99), problem) for solver in (HeavyBall, Picard))
    assert mine.stats.converged[0] == 1
    np.testing.assert_allclose(mine.value, plain.value, rtol=1e-4)


def test_an_earlier_solution_is_a_warm_start():
    rng = np.random.default_rng(0)
    w, x = (0.3 * rng.normal(size=(6, 6))).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
    run = jax.jit(lambda z0, x: fixed_point(lambda z: jnp.tanh(z @ w + x), z0, solver=Anderson(tol=1e-5)))
    warm = run(run(0 * x, x).value, np.float32(1.001) * x)
    from_zero = run(0 * x, np.float32(1.001) * x)
    assert warm.stats.converged.all() and warm.stats.nfe <= from_zero.stats.nfe - 2


def test_a_state_without_a_batch_axis_is_one_problem():
    w = 0.5 * jnp.eye(3)

    def run(x, batched):
        f = lambda z: {"a": jnp.tanh(z["a"] @ w + x), "b": jnp.cos(z["b"]) * 0.5}  # noqa: E731
        z0 = {"a": jnp.zeros_like(x), "b": jnp.zeros(x.shape[:-1])}
        return fixed_point(f, z0, solver=Picard(trace=True, trajectory_steps=(2,)), batched=batched)

    x = np.float32([1.0, 2.0, 3.0])
    one, many = jax.device_get(jax.jit(lambda x: (run(x, False), run(x[None], True)))(x))
    assert one.stats.converged.shape == () and one.stats.relative_trace.shape == (50,)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), one.value, many.value)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, 0]), one.trajectory, many.trajectory)
    total = lambda x, b: run(x[None] if b else x, b).value["a"].sum()  # noqa: E731
    slopes = jax.jit(lambda x: [jax.grad(total)(x, b) for b in (False, True)])(x)
    np.testing.assert_allclose(*slopes, rtol=1e-6)


def maps_to_zero():
    """Return linear maps and starts; three have the solution 0, the last one a small one."""
    rng = np.random.default_rng(0)
    q = [np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(3)]
    a = np.stack([q[0] @ np.diag(np.linspace(-0.95, 0.95, 8)) @ q[0].T, 0.9 * q[1], 0.6 * q[2], 0.5 * np.eye(8)])
    shift = np.zeros((4, 8))
    shift[3] = 1e-8
    return a.astype(np.float32), shift.astype(np.float32), rng.normal(size=(4, 8)).astype(np.float32)


@pytest.mark.parametrize("solver", [Picard(1e-4), Picard(1e-4, max_steps=700), Anderson(1e-4), Broyden(1e-4)], ids=repr)
def test_a_solution_of_zero_is_approached_and_found(solver):
    """The relative residual does not fall on the way: that of 0.9 q z is about 1 everywhere. A small solution is no zero."""
    a, shift, z0 = maps_to_zero()
    f = lambda z: jnp.einsum("bij,bj->bi", a, z) + shift  # noqa: E731
    sol = jax.device_get(jax.jit(lambda z0: fixed_point(f, z0, solver=solver))(z0))
    size = np.linalg.norm(sol.value - 2 * shift, axis=1) / np.linalg.norm(z0, axis=1)
    if sol.stats.converged.all():
        assert size.max() < 1e-9 and np.linalg.norm(sol.value[3] - 2 * shift[3]) < 5e-3 * np.linalg.norm(shift[3])
    else:
        steps = solver.max_steps - 1
        assert size[0] <= 1.1 * 0.95**steps and size[1] <= 1.1 * 0.9**steps  # the last iterate of Picard's, or a better one
    assert sol.stats.converged.all() == (solver.max_steps == 700 or isinstance(solver, Broyden))
