"""Broyden's directions in blocks: the same solution as in one piece, and no read of a block without a direction.

The state has 3 samples of 2,048 elements, enough to be cut, and the problem takes 42 steps: all of five blocks.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deq_flax import SHINE, Broyden, fixed_point, fixed_point_queue
from deq_flax.equilibrium.solvers import broyden
from tests.cases import others_slow
from tests.equilibrium.dense import close

LIMITS = {"tol": 1e-9, "max_steps": 42}
PLAIN = Broyden(**LIMITS)
SLOPES = np.linspace(-6.0, 0.9, 2048)[np.random.default_rng(0).permutation(2048)]
X = np.random.default_rng(1).normal(size=(3, 2048))


def f(z, x, slopes=SLOPES):
    return 0.3 * slopes[None] * jnp.sin(z) + x


def solved(x, solver=PLAIN):
    sol = fixed_point(f, jnp.zeros_like(x), x, solver=solver)
    return sol.value, sol.stats.nfe, sol.stats.relative_residual


def shine(x):
    loss = lambda x: jnp.sum(jnp.square(fixed_point(f, 0 * x, x, solver=PLAIN, gradient=SHINE()).value))  # noqa: E731
    return jax.grad(loss)(x)


def queue(x):
    return fixed_point_queue(f, jnp.zeros_like(x), x, slots=2, solver=PLAIN).value


def shards(x, check_vma):
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    solver = Broyden(**LIMITS, axis_name="model")
    local = lambda slopes, x: fixed_point(lambda z: f(z, x, slopes), 0 * x, solver=solver).value  # noqa: E731
    specs = {"in_specs": (P("model"), P(None, "model")), "out_specs": P(None, "model"), "check_vma": check_vma}
    return jax.shard_map(local, mesh=mesh, **specs)(jnp.asarray(SLOPES), x)


WAYS = {
    "batch": solved,
    "line search": partial(solved, solver=Broyden(**LIMITS, line_search=True)),
    "vmap": lambda x: jax.vmap(solved)(jnp.stack([x, 4.0 * x])),
    "queue": queue,
    "shine": shine,
    "shards, checked": partial(shards, check_vma=True),
    "shards, unchecked": partial(shards, check_vma=False),
}


@pytest.mark.parametrize("way", others_slow(WAYS, ["vmap"]))
def test_the_solution_is_that_of_one_piece(monkeypatch, way):
    with jax.enable_x64(True):
        cut = jax.jit(lambda x: WAYS[way](x))(jnp.asarray(X))
        monkeypatch.setattr(broyden, "CUT_FROM", 10**9)
        whole = jax.jit(lambda x: WAYS[way](x))(jnp.asarray(X))
    for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        close(a, b, rtol=1e-6, atol=1e-8)


def test_no_block_is_read_before_it_holds_a_direction():
    state = PLAIN.init(jnp.asarray(X, jnp.float32))
    assert [block.shape[1] for block in state.directions] == [8, 8, 8, 8, 9]
    first, second, *later = state.directions
    poisoned = state._replace(directions=(first, second, *(jnp.full_like(block, jnp.nan) for block in later)))
    step = jax.jit(lambda k: PLAIN.step(k, jnp.asarray(X, jnp.float32), jnp.ones_like(first[:, 0]), poisoned))
    assert np.isfinite(step(16)[0]).all(), "row 15 is the last of the second block"
    assert np.isnan(step(17)[0]).any()


def test_under_vmap_one_branch_runs():
    """A `switch` on an index of each problem would run all five branches, and choose."""
    program = jax.jit(jax.vmap(solved)).lower(jnp.zeros((2, *X.shape), jnp.float32)).compile().as_text()
    assert 5 in [len(found.split(",")) for found in re.findall(r"branch_computations=\{([^}]*)\}", program)]
