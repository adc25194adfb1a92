"""A slot of a solver's history that holds nothing never has weight.

An empty row has residual zero, so a least-squares problem that saw it would give it all the weight, and the iterate would be
about zero, where an equilibrium is not.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import Anderson, Broyden, fixed_point
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
