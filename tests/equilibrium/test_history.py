"""A slot of a solver's history that holds nothing never has weight; a history may be rounded, and be read row by row.

An empty row has residual zero, so a least-squares problem that saw it would give it all the weight, and the iterate would be
about zero, where an equilibrium is not.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import SHINE, Anderson, Broyden, Implicit, fixed_point
from deq_flax.equilibrium.solvers import history
from tests.cases import others_slow

STEPS = 9
SOLVERS = [
    Anderson(memory=5, relaxation=0.7),
    Broyden(memory=5),
    Anderson(memory=5),
    Anderson(memory=5, ridge=0.0),
]


def iterates(solver, memory):
    """All iterates (steps, samples, elements) of z = tanh(z W) + 10, whose equilibria are far from zero."""
    solver = replace(solver, memory=memory, tol=0.0, max_steps=STEPS, trajectory_steps=tuple(range(STEPS)))

    @jax.jit
    def solve(w, z0):
        return fixed_point(lambda z: jnp.tanh(z @ w) + 10.0, z0, solver=solver)

    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        w, z0 = 0.3 * random.normal(size=(6, 6)), 10 + random.normal(size=(3, 6))
        sol = jax.device_get(solve(w, z0))
    return np.asarray(sol.trajectory), sol.stats


@pytest.mark.parametrize("solver", others_slow(SOLVERS, SOLVERS[:1]), ids=repr)
def test_iterates_do_not_depend_on_slots_that_are_still_empty(solver):
    """With room for many iterates or just for those there are: the same, as long as none had to be dropped."""
    wide, _ = iterates(solver, 7)
    for memory in (2, 4):
        exact, _ = iterates(solver, memory)
        np.testing.assert_allclose(exact[: memory + 1], wide[: memory + 1], rtol=1e-12)


@pytest.mark.parametrize("solver", others_slow(SOLVERS, SOLVERS[:1]), ids=repr)
def test_no_iterate_is_drawn_to_zero(solver):
    path, stats = iterates(solver, 8)
    assert np.abs(path).min() > 5, "the equilibrium, and every value of f, is between 9 and 11"
    assert (stats.relative_residual < 1e-2).all()


ROUNDED = [Broyden(), Broyden(memory=6), Broyden(line_search=True)]


@pytest.mark.parametrize("solver", others_slow(ROUNDED, ROUNDED[:1]), ids=repr)
def test_rounded_steps_lead_as_low_as_exact_ones(solver):
    """To 1e-12 in float64, with steps of 8 bits: a step is what was rounded, so the error of rounding is no error of z."""
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        w, z0 = 0.2 * random.normal(size=(16, 16)), random.normal(size=(8, 16))
        counts = {}
        for kept in (None, "bfloat16"):
            rule = replace(solver, history_dtype=kept, tol=1e-12, max_steps=60)
            stats = jax.jit(lambda z0, rule=rule: fixed_point(lambda z: jnp.tanh(z @ w) + 1.0, z0, solver=rule).stats)(z0)
            assert (stats.relative_residual <= 1e-12).all()
            counts[kept] = float(stats.steps.mean())
    assert counts["bfloat16"] <= 1.5 * counts[None]


@pytest.mark.parametrize("solver", others_slow(ROUNDED, ROUNDED[1:2]), ids=repr)
def test_a_step_is_what_the_history_says_of_it(solver):
    """z_{k+1} - z_k is the row of step k, in the units of the state: not that row before it was rounded."""
    rule, rows = replace(solver, history_dtype="bfloat16"), solver.memory or solver.max_steps - 1
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        w, z = 0.2 * random.normal(size=(16, 16)), jnp.asarray(random.normal(size=(4, 16)))
        step, state, before, seen = jax.jit(rule.step), rule.init(z), z, 0
        for k in range(14):
            taken, slot, multiple = z - before, int(state.slot[0]), state.multiple
            before = z
            z, state = step(jnp.asarray(k), z, jnp.tanh(z @ w) + 1.0 - z, state)
            if 0 <= slot < rows - 1:  # with the last row a bounded history is reduced
                row = jnp.concatenate(state.directions, axis=1)[:, slot].astype(z.dtype)
                kept = state.scale * row / (state.multiple / multiple)[:, None]
                np.testing.assert_allclose(kept, taken, rtol=1e-4, atol=1e-11)
                seen += 1
        assert seen > 8


def test_a_rounded_history_takes_half_the_memory():
    kept = {
        name: Broyden(max_steps=30, history_dtype=name).init(jnp.zeros((4, 2048))).directions for name in (None, "bfloat16")
    }
    size = {name: sum(block.nbytes for block in blocks) for name, blocks in kept.items()}
    assert size[None] == 29 * 4 * 2048 * 4 and size["bfloat16"] == size[None] / 2


@pytest.mark.parametrize("gradient", [Implicit(solver=Broyden(1e-10, 60)), SHINE(refine_steps=20)], ids=repr)
def test_gradients_of_solves_with_a_rounded_history_are_exact(gradient):
    """The shared inverse of SHINE is refined, so it is exact too."""
    with jax.enable_x64(True):
        random = np.random.default_rng(1)
        w, x = 0.2 * random.normal(size=(6, 6)), random.normal(size=(3, 6))

        def loss(w, solver, gradient):
            return fixed_point(lambda z: jnp.tanh(z @ w + x), jnp.zeros((3, 6)), solver=solver, gradient=gradient).value.sum()

        exact = jax.grad(loss)(w, Broyden(1e-13, 60), Implicit(solver=Broyden(1e-13, 60)))
        if isinstance(gradient, Implicit):
            gradient = Implicit(solver=replace(gradient.solver, history_dtype="bfloat16"))
        ours = jax.grad(loss)(w, Broyden(1e-12, 60, history_dtype="bfloat16"), gradient)
        np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_rows_that_are_read_one_by_one_lead_to_the_same_iterates(monkeypatch, solver):
    together, _ = iterates(solver, 5)
    monkeypatch.setattr(history, "ROW_BY_ROW_FROM", 0)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, tpu, default: tpu(*x))
    np.testing.assert_allclose(iterates(solver, 5)[0], together, rtol=1e-9)


@pytest.mark.parametrize(("shape", "one_by_one"), [((4, 6, 2**19), True), ((4, 6, 2**18), False), ((1, 6, 2**21), False)])
def test_a_tpu_reads_large_rows_of_several_samples_one_by_one(shape, one_by_one):
    rows, x, weights = (jax.ShapeDtypeStruct(axes, jnp.float32) for axes in (shape, shape[::2], shape[:2]))
    for read, other in ((history.dots, x), (history.combined, weights)):
        for platform in ("tpu", "cpu", "cuda"):
            program = jax.jit(read).trace(rows, other).lower(lowering_platforms=(platform,)).as_text()
            assert ("dot_general" not in program) == (one_by_one and platform == "tpu")
