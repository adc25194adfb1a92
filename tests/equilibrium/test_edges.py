"""Edges: empty batches, limits, strict dtypes, and arguments of the wrong kind, each solved or refused in one clear line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax import (
    GMRES,
    SHINE,
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    Neumann,
    PhantomGradient,
    Picard,
    Reversible,
    Unroll,
    backward_probe,
    fixed_point,
    fixed_point_queue,
)

PAIRS = [
    (Broyden(trace=True, trajectory_steps=(1,)), Implicit(GMRES())),
    (Broyden(memory=4, line_search=True, history_dtype="bfloat16"), SHINE(2)),
    (Anderson(), Implicit()),
    (Picard(), Reversible()),
    (Picard(), PhantomGradient()),
    (Picard(), Neumann()),
    (Picard(), Unroll(4)),
]


def slopes(z0, solver, gradient):
    """Solve with leaves like z0 and an input of float32, and differentiate with respect to the input and the probe."""

    def total(x, probe):
        f = lambda z: jax.tree.map(lambda z: 0.5 * jnp.cos(z) + x.astype(z.dtype), z)  # noqa: E731
        sol = fixed_point(f, z0, solver=solver, gradient=gradient, probe=probe, on_failure="nan")
        return sum(leaf.sum().astype(jnp.float32) for leaf in jax.tree.leaves(sol.value)), sol

    return jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.float32(1.0), backward_probe().astype(jnp.float32))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{type(pair[0]).__name__} {type(pair[1]).__name__}")
def test_an_empty_batch_has_an_empty_solution(pair):
    z0 = {"a": np.zeros((0, 3), np.float32), "b": np.zeros((0, 2, 0), np.float32)}
    (slope, report), sol = jax.jit(lambda z0: slopes(z0, *pair))(z0)
    assert slope == 0 and report[1] == 0 and sol.value["b"].shape == (0, 2, 0)
    assert sol.stats.converged.shape == (0,) and sol.stats.nfe <= 5


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{type(pair[0]).__name__} {type(pair[1]).__name__}")
def test_no_dtype_is_promoted_implicitly(pair):
    """Leaves of three dtypes, and float32 in a program of float64. Only traced: an implicit promotion raises."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        leaves = {name: jnp.zeros((2, 3), name) for name in ("float64", "float32", "bfloat16")}
        for z0 in (leaves, leaves["float32"]):
            jax.jit(lambda z0: slopes(z0, *pair)).trace(z0)


def solve(**options):
    return fixed_point(lambda z: 0.5 * z + 1, jnp.zeros((1, 2)), **options)


def traced(make):
    return lambda: jax.jit(make).trace(1.0)


REFUSED = {
    "negative tol": (lambda: Implicit(tol=-1), ValueError, r"Implicit: tol must be in \[0, inf\), not -1"),
    "infinite tol": (lambda: Picard(tol=np.inf), ValueError, r"Picard: tol must be in \[0, inf\), not inf"),
    "NaN tol": (lambda: GMRES(tol=np.nan), ValueError, "GMRES: tol"),
    "traced tol": (
        traced(lambda t: Broyden(tol=t).max_steps),
        TypeError,
        "Broyden: tol must be a number of Python, not .* traced",
    ),
    "array tol": (lambda: Implicit(tol=jnp.ones(())), TypeError, "Implicit: tol must be a number of Python"),
    "text tol": (lambda: Anderson(tol="1e-3"), TypeError, "Anderson: tol must be a number of Python, not '1e-3'"),
    "no steps": (lambda: Implicit(max_steps=0), ValueError, r"Implicit: max_steps must be in \[1, inf\), not 0"),
    "float steps": (lambda: Picard(max_steps=1e2), TypeError, "Picard: max_steps must be a whole number of Python, not 100.0"),
    "bool steps": (lambda: GMRES(max_steps=True), TypeError, "GMRES: max_steps must be a whole number"),
    "call's limit of 0": (
        lambda: solve(max_steps=0),
        ValueError,
        "max_steps must be from 1 to the solver's own limit, 50, not 0",
    ),
    "call's limit above": (lambda: solve(max_steps=np.int32(51)), ValueError, "from 1 to the solver's own limit, 50, not 51"),
    "call's float limit": (lambda: solve(max_steps=3.0), TypeError, "max_steps must be a whole number, not 3.0"),
    "call's bool limit": (lambda: solve(max_steps=True), TypeError, "max_steps must be a whole number, not True"),
    "call's vector limit": (
        lambda: jax.jit(lambda n: solve(max_steps=n)).trace(np.ones(2, np.int32)),
        TypeError,
        r"max_steps must be a whole number, not a traced int32\[2\]",
    ),
    "call's traced float limit": (traced(lambda n: solve(max_steps=n)), TypeError, r"not a traced float32\[\]"),
    "call's limit above the steps": (
        lambda: solve(max_steps=50, gradient=Unroll(10)),
        ValueError,
        "max_steps must be from 1 to the steps of Unroll, 10, not 50",
    ),
    "probe's shape": (lambda: solve(probe=jnp.zeros(2)), ValueError, r"probe must be the array of backward_probe\(\).*\(2,\)"),
    "probe's dtype": (
        lambda: solve(probe=jnp.zeros(3, int)),
        TypeError,
        r"probe must be the array .* floating dtype, not int32",
    ),
    "probe's type": (lambda: solve(probe=[0.0, 0.0, 0.0]), TypeError, r"probe must be the array .* not list"),
    "steps of a trajectory": (lambda: Picard(trajectory_steps=(1.5,)), ValueError, "trajectory_steps must be a tuple of inc"),
    "axis": (
        lambda: Picard(axis_name=3),
        TypeError,
        "Picard: axis_name must be the name of an axis or a tuple of names, not 3",
    ),
    "axes": (lambda: GMRES(axis_name=("a", 3)), TypeError, "GMRES: axis_name must be the name of an axis or a tuple of names"),
    "slots": (
        lambda: fixed_point_queue(jnp.tanh, jnp.zeros((1, 2)), slots=2.0),
        TypeError,
        "fixed_point_queue: slots must be a whole number of Python, not 2.0",
    ),
    "history's type": (
        lambda: Broyden(history_dtype=jnp.bfloat16),
        TypeError,
        "Broyden: history_dtype must be the name of a type",
    ),
    "history of integers": (
        lambda: Broyden(history_dtype="int8"),
        ValueError,
        "history_dtype: 'int8' is no floating-point type",
    ),
    "unknown history": (lambda: Broyden(history_dtype="half8"), ValueError, "history_dtype: 'half8' is no floating-point type"),
    "traced relaxation": (
        traced(lambda r: Picard(relaxation=r).tol),
        TypeError,
        "relaxation must be a number of Python, not an",
    ),
    "infinite ridge": (lambda: Anderson(ridge=np.inf), ValueError, r"Anderson: ridge must be in \[0, inf\), not inf"),
    "gradient's name": (lambda: solve(gradient="implicit"), TypeError, r"gradient must be an object such as Implicit\(\)"),
    "gradient's class": (lambda: solve(gradient=Neumann), TypeError, r"gradient must be an object such as Implicit\(\)"),
    "layer's solver": (lambda: Equilibrium(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), solver=Broyden), TypeError, "solver must be"),
    "layer's gradient": (lambda: Equilibrium(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), gradient=Neumann), TypeError, "gradient must"),
}


WHOLE = [
    (Anderson, "memory", 10.0),
    (Broyden, "memory", 10.0),
    (GMRES, "restart", 2.5),
    (Neumann, "terms", 3.0),
    (PhantomGradient, "steps", 2.0),
    (Reversible, "checkpoint_every", 2.5),
    (SHINE, "refine_steps", False),
    (Unroll, "steps", True),
    (Unroll, "steps", None),
    (Unroll, "steps", "5"),
    (functools.partial(Unroll, 5), "last", 2.0),
]


@pytest.mark.parametrize("make,option,value", WHOLE)
def test_a_count_is_a_whole_number(make, option, value):
    with pytest.raises(TypeError, match=f": {option} must be a whole number of Python, not {value!r}"):
        make(**{option: value})


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_refused_in_one_line(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_a_limit_for_one_call_lowers_the_number_of_evaluations():
    run = jax.jit(lambda n: solve(solver=Picard(tol=0, max_steps=9), max_steps=n).stats.nfe)
    assert [int(run(n)) for n in (-3, 4, 99)] == [1, 4, 9]  # traced: clipped
    assert int(jax.jit(lambda: solve(solver=Picard(tol=0, max_steps=9), max_steps=4).stats.nfe)()) == 4


def test_named_inputs_reach_the_cell_and_are_differentiated():
    class Cell(nnx.Module):
        def __call__(self, z, x, *, gain, mode):
            assert mode == "half"
            return 0.5 * z + gain * x

    layer = Equilibrium(Cell(), solver=Picard())
    x = jnp.ones((2, 3))
    slope = jax.jit(jax.grad(lambda g: layer(jnp.zeros_like(x), x, gain=g, mode="half").value.sum()))(1.0)
    np.testing.assert_allclose(slope, 12.0, rtol=1e-5)


@pytest.mark.parametrize("solver", [Anderson(3e-3), Broyden(1e-3)], ids=repr)
def test_a_residual_in_bfloat16_is_that_of_the_state_which_is_returned(solver):
    """The solver's iterates are float32; f and the caller get them rounded."""
    rng = np.random.default_rng(0)
    w, x = (0.6 * rng.normal(size=(16, 16)) / 4).astype(np.float32), rng.normal(size=(50, 16)).astype(np.float32)
    f = lambda z: jnp.tanh(z.astype(jnp.float32) @ w + x).astype(jnp.bfloat16)  # noqa: E731
    sol = jax.jit(lambda z: fixed_point(f, z, solver=solver))(jnp.zeros((50, 16), jnp.bfloat16))
    z, fz = (np.asarray(a, float) for a in (sol.value, f(sol.value)))
    residual = np.linalg.norm(fz - z, axis=1) / np.linalg.norm(fz, axis=1)
    np.testing.assert_allclose(sol.stats.relative_residual, residual, rtol=5e-3, atol=1e-7)
    assert sol.stats.converged.any()
