"""Solves inside `jax.shard_map`, with JAX's check of varying types and without: values and gradients are those of one."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deq_flax import (
    GMRES,
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
    jacobian_loss,
    spectral_radius,
)
from deq_flax.equilibrium import backward_probe
from tests.cases import others_slow
from tests.commands import ROOT
from tests.equilibrium.dense import cell, close, loss, problem

TIGHT = {"tol": 1e-10, "max_steps": 60}
checks = pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])


def name(x):
    return {True: "checked", False: "unchecked"}[x] if isinstance(x, bool) else getattr(x, "__name__", type(x).__name__)


def mesh(size, name):
    return Mesh(np.array(jax.devices()[:size]), (name,))


def differentiated(f, count):
    return jax.jit(jax.value_and_grad(f, argnums=tuple(range(count)), has_aux=True))


PAIRS = [
    (Picard(**TIGHT), Implicit()),
    (Picard(**TIGHT), JacobianFree()),
    (Picard(**TIGHT), Unroll(20)),
    (Anderson(**TIGHT, memory=5, restart=True, trace=True), Implicit(solver=GMRES(**TIGHT))),
    (Broyden(**TIGHT, trajectory_steps=(2,)), Implicit()),
    (Broyden(**TIGHT), SHINE()),
    (Broyden(**TIGHT, line_search=True), Neumann(5)),
    (Picard(**TIGHT), PhantomGradient(3)),
    (Picard(**TIGHT), Reversible()),
    (Picard(**TIGHT), Unroll(20, last=3)),
]
EVERY = [(*pair, check) for pair in PAIRS for check in (True, False)]
QUICK = [(*PAIRS[4], True)]


@pytest.mark.parametrize("solver,gradient,check_vma", others_slow(EVERY, QUICK), ids=name)
def test_shards_of_a_batch_give_what_the_whole_gives(solver, gradient, check_vma):
    """The gradient is taken inside the shards, as a trainer does, and outside of them."""
    with jax.enable_x64(True):
        w, x, _ = problem()
        x = np.concatenate([x, 3 * x])[:4]

        def whole(w, x, probe):
            sol = fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=gradient, probe=probe)
            return loss(sol.value), sol.stats.steps

        def local(w, x, probe):
            def from_inside(w, x, probe):
                return jax.value_and_grad(lambda *a: whole(*a)[0], argnums=(0, 1, 2))(w, x, probe)

            value, (to_w, to_x, to_probe) = from_inside(w, x, probe)
            if not check_vma:  # JAX then does not know that w is the same everywhere
                to_w, to_probe = jax.lax.psum((to_w, to_probe), "data")
            total, steps = whole(w, x, probe)
            return jax.lax.psum((total, value), "data"), steps, (to_w, to_x, to_probe)

        out = ((P(), P()), P("data"), (P(), P("data"), P()))
        mapped = jax.shard_map(local, mesh=mesh(2, "data"), in_specs=(P(), P("data"), P()), out_specs=out, check_vma=check_vma)

        def sharded(w, x, probe):
            (total, value), steps, inside = mapped(w, x, probe)
            return total, (value, steps, inside)

        arguments = (w, x, backward_probe())
        (expected, steps), outside = differentiated(whole, 3)(*arguments)
        (total, (value, of_shards, inside)), through = differentiated(sharded, 3)(*arguments)
        close((total, value), (expected, expected), rtol=1e-9)
        np.testing.assert_array_equal(of_shards, steps)
        # SHINE's inverse goes on changing while the slowest sample of its batch iterates: by rounding.
        close((through[:2], inside[:2]), (outside[:2], outside[:2]), rtol=1e-5 if isinstance(gradient, SHINE) else 1e-8)
        solves = 2 if isinstance(gradient, Implicit) else 0
        assert through[2][2] == inside[2][2] == solves and outside[2][2] == solves / 2, "one adjoint solve on each shard"


def replicated(w, x, options):
    """Tensor parallelism: every shard has the whole state, and a part of the rows of w."""
    i, size = jax.lax.axis_index("model"), len(w)

    def f(z):
        part = jax.lax.dynamic_slice_in_dim(z, i * size, size, axis=1)
        return jnp.tanh(jax.lax.psum(part @ w, "model") + x)

    return fixed_point(f, jnp.zeros_like(x), **options)


def split(w, x, options):
    """Every shard has a part of each sample's state, and that part's columns of w."""
    f = lambda z: jnp.tanh(jax.lax.all_gather(z, "model", axis=1, tiled=True) @ w + x)  # noqa: E731
    return fixed_point(f, jnp.zeros_like(x), **options)


def normalized_cell(z, w, x, mean=lambda y: jnp.mean(y, axis=0)):
    """A layer with batch normalization: its samples are coupled."""
    y = z @ w + x
    y = y - mean(y)[None]
    return jnp.tanh(0.5 * y / jnp.sqrt(mean(y * y) + 0.1)[None])


def coupled(w, x, options):
    """Every shard has some of the samples, which together are one problem."""
    f = lambda z: normalized_cell(z, w, x, lambda y: jax.lax.pmean(jnp.mean(y, axis=0), "model"))  # noqa: E731
    return fixed_point(f, jnp.zeros_like(x), batched=False, **options)


SPREAD = {
    replicated: (P("model"), P(), P()),
    split: (P(None, "model"), P(None, "model"), P(None, "model")),
    coupled: (P(), P("model"), P("model")),
}
"""Specs of w, x and the state."""
METHODS = [
    (Broyden(**TIGHT, line_search=True), Implicit(solver=GMRES(**TIGHT))),
    (Anderson(**TIGHT, memory=4, restart=True), Implicit()),
    (Broyden(**TIGHT), SHINE()),
    (Picard(**TIGHT), Reversible()),
]
EVERY_PLACE = [(*method, place, check) for method in METHODS for place in SPREAD for check in (True, False)]
QUICK_PLACES = [(*METHODS[0], coupled, True)]


@pytest.mark.parametrize("solver,gradient,place,check_vma", others_slow(EVERY_PLACE, QUICK_PLACES), ids=name)
def test_a_problem_spread_over_shards_is_solved_as_on_one_device(solver, gradient, place, check_vma):
    with jax.enable_x64(True):
        w, x, _ = problem()
        x = np.concatenate([x, 0.5 * x])[:4]
        one = {"solver": solver, "gradient": gradient, "batched": place is not coupled}
        many = {"solver": dataclasses.replace(solver, axis_name="model"), "gradient": gradient}

        def whole(w, x):
            sol = fixed_point(normalized_cell if place is coupled else cell, jnp.zeros_like(x), w, x, **one)
            return loss(sol.value), (sol.value, sol.stats.steps, sol.stats.relative_residual)

        def local(w, x):
            sol = place(w, x, many)
            return sol.value, sol.stats.steps, sol.stats.relative_residual

        of_w, of_x, of_z = SPREAD[place]
        specs = {"in_specs": (of_w, of_x), "out_specs": (of_z, P(), P()), "check_vma": check_vma}
        mapped = jax.shard_map(local, mesh=mesh(2, "model"), **specs)

        def sharded(w, x):
            value, *stats = mapped(w, x)
            return loss(value), (value, *stats)

        (_, (z, steps, residual)), expected = differentiated(whole, 2)(w, x)
        (_, (value, same_steps, same_residual)), slopes = differentiated(sharded, 2)(w, x)
        close(value, z, rtol=1e-9)
        np.testing.assert_array_equal(same_steps, steps)
        close(same_residual, residual, rtol=1e-3, atol=1e-14)
        # SHINE's inverse is that of the whole course of the solve, which amplifies rounding.
        rtol, atol = (1e-4, 1e-5) if isinstance(gradient, SHINE) else (1e-6, 1e-8)
        close(slopes, expected, rtol=rtol, atol=atol)


@checks
def test_jacobian_tools_work_on_shards(check_vma):
    w, x, v = problem()
    w, x, v = w, np.concatenate([x, x])[:4], np.concatenate([v, v])[:4]

    def tools(w, x, v):
        f, key = lambda z: cell(z, w, x), jax.random.key(0)
        return jacobian_loss(f, x, vectors=v), jacobian_loss(f, x, key), spectral_radius(f, x, key)

    def local(w, x, v):
        losses = [jax.lax.pmean(value, "data") for value in tools(w, x, v)[:2]]
        return *losses, tools(w, x, v)[2]

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P(), P("data")), "check_vma": check_vma}
    ours = jax.jit(jax.shard_map(local, mesh=mesh(2, "data"), **specs))(w, x, v)
    whole = jax.jit(tools)(w, x, v)
    np.testing.assert_allclose(ours[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(ours[2], whole[2], rtol=1e-2)
    assert np.isfinite(ours[1])


@pytest.mark.parametrize(
    "f",
    [
        lambda z: jnp.tanh(z + jax.lax.pmean(z, "model")),
        lambda z: jax.lax.scan(lambda c, _: (jax.lax.ppermute(c, "model", [(0, 1), (1, 0)]), None), z, None, length=2)[0],
        lambda z: jax.jit(lambda z: jax.lax.all_gather(z, "model").sum(0))(z),
    ],
    ids=["pmean", "ppermute in scan", "all_gather in jit"],
)
@checks
def test_communication_over_an_unnamed_axis_is_refused(f, check_vma):
    run = lambda z: fixed_point(f, z).value  # noqa: E731
    mapped = jax.shard_map(run, mesh=mesh(2, "model"), in_specs=P("model"), out_specs=P("model"), check_vma=check_vma)
    with pytest.raises(ValueError, match=r"over the axis 'model'.*Broyden\(axis_name='model'\)"):
        jax.eval_shape(mapped, jnp.ones((2, 3)))


def test_an_f_that_holds_a_shard_map_is_solved_outside_of_one():
    """Its shards are those of one evaluation, so that no axis need be named: value and gradient of a product in two parts."""
    w, x, _ = problem()
    parts = {"in_specs": (P(None, "model"), P("model")), "out_specs": P()}
    product = jax.shard_map(lambda z, w: jax.lax.psum(z @ w, "model"), mesh=mesh(2, "model"), **parts)

    def total(w, multiply):
        f = lambda z: jnp.tanh(multiply(z, w) + x)  # noqa: E731
        return loss(fixed_point(f, jnp.zeros_like(x), solver=Picard(tol=1e-6)).value)

    sharded, dense = (jax.jit(jax.value_and_grad(functools.partial(total, multiply=m)))(w) for m in (product, jnp.matmul))
    close(sharded, dense, rtol=1e-4, atol=1e-4)


def test_an_axis_of_vmap_may_be_named_too():
    """Two problems that see each other through a mean, as an axis of vmap, are one problem of twice the size."""
    x = np.float32([[1.0, 2.0], [30.0, -1.0]])
    solver = Broyden(tol=1e-6, axis_name="pair")
    f = lambda z, x: 0.5 * jnp.tanh(z) - jax.lax.pmean(z, "pair") + x  # noqa: E731
    run = jax.vmap(lambda x: fixed_point(f, 0 * x, x, solver=solver, batched=False), axis_name="pair")
    sol = jax.jit(run)(x)
    np.testing.assert_allclose(sol.value, 0.5 * np.tanh(sol.value) - sol.value.mean(0)[None] + x, atol=1e-4)
    assert sol.stats.converged.all() and sol.stats.steps[0] == sol.stats.steps[1]


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.sharding import Mesh, PartitionSpec as P
from deq_flax import Picard
from deq_flax.equilibrium.loop import solve

def local(x):
    f = lambda z: 0.5 * jnp.tanh(z) + 0.1 * jax.lax.pmean(z, "data") + x
    return solve(f, x, Picard(axis_name=sys.argv[1] or None))[0]

mesh = Mesh(np.array(jax.devices()), ("data",))
x = jnp.float32([[1.0], [1e4]])
z = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))(x)
assert abs(0.5 * jnp.tanh(z) + 0.1 * z.mean() + x - z).max() < 1e-2, z
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", ""])
def test_shards_that_stop_apart_wait_for_each_other_without_end(axis):
    """What the refusal above prevents: the loop alone, without the name of the axis, is ended by XLA's time limit."""
    limits = "--xla_cpu_collective_call_terminate_timeout_seconds=2 --xla_cpu_collective_call_warn_stuck_timeout_seconds=1"
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {limits}"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, axis], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode == 0) == bool(axis), run.stderr
