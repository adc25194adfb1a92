"""MDEQ agrees with the authors' PyTorch code, both versions of it, in float64, on every fixture of `tests/mdeq_reference.py`.

Errors allowed: 1e-10 for one evaluation and its surroundings, 1e-8 for equilibria, 1e-6 relative for gradients.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deq_flax.equilibrium import Broyden, Implicit, PhantomGradient, Unroll, fixed_point
from tests import mdeq_reference as reference
from tests.reference import QUICK_COMPILE, flat, load, solving

TIGHT = Broyden(tol=1e-12, max_steps=120)
jit = partial(jax.jit, compiler_options=QUICK_COMPILE)


TRAINING = jax.random.key(0)
"""The fixtures drop nothing: a key only selects the batch normalization of training."""


def predict(model, images, solver, gradient, key):
    """The logits at the resolution of the authors' loss, for segmentation that of the first branch, and the branches."""
    if model.head.__class__.__name__ == "ClassificationHead":
        out = model(images, solve=solving(solver=solver, gradient=gradient), key=key)
        return out.logits, out.branches
    f, z0, *_ = model.equation(images, key)
    z = fixed_point(f, z0, solver=solver, gradient=gradient).value
    return model.head(z, key is not None), z


@partial(jit, static_argnums=(0, 1, 2))
def run_training(graphdef, solver, gradient, params, variables, images, labels, key=TRAINING):
    """(loss, (logits, branches, running statistics after)), and the gradient."""

    def loss(params):
        model = nnx.merge(graphdef, params, variables, copy=True)
        logits, z = predict(model, images, solver, gradient, key)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return value, (logits, z, nnx.split(model, nnx.Param, ...)[2])

    return jax.value_and_grad(loss, has_aux=True)(params)


@partial(jit, static_argnums=(0, 1))
def run_evaluation(graphdef, solver, params, variables, images, z_rand):
    """(injection, f(z_rand), logits, branches, variables after)."""
    model = nnx.merge(graphdef, params, variables, copy=True)
    logits, z = predict(model, images, solver, None, None)
    f, *_ = model.equation(images)
    return model.stem(images, False), f(z_rand), logits, z, nnx.split(model, nnx.Param, ...)[2]


@cache
def fixture(name):
    arrays = load(name)
    with jax.enable_x64(True):
        model = reference.build(name)
        return arrays, reference.table_of(name, model), nnx.split(model, nnx.Param, ...)


def trained(name, gradient=None, solver=TIGHT):
    arrays, table, (graphdef, params, variables) = fixture(name)
    with jax.enable_x64(True):
        inputs = reference.images(arrays), jnp.asarray(arrays["y"])
        return arrays, table, run_training(graphdef, solver, gradient, params, variables, *inputs)


def theirs(logits):
    """Logits in the originals' order of axes."""
    return np.moveaxis(np.asarray(logits), -1, 1)


def close(ours, theirs, error):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)


def all_close(ours, theirs, error):
    for x, y in zip(ours, theirs, strict=True):
        close(x, y, error)


def same_gradients(gradient, arrays, prefix, table, error=1e-6):
    """Compare each gradient relative to its norm, or to that of the whole where the expected one is rounding error."""
    ours, expected = flat(gradient), reference.ours(arrays, f"{prefix}/grad/", table)
    assert set(ours) == set(expected)
    whole = np.sqrt(sum(np.sum(x**2) for x in expected.values()))
    for path, x in expected.items():
        assert np.linalg.norm(ours[path] - x) <= error * max(np.linalg.norm(x), 1e-6 * whole), path


@pytest.mark.parametrize("name", reference.FIXTURES)
def test_evaluation(name):
    arrays, _, (graphdef, params, variables) = fixture(name)
    with jax.enable_x64(True):
        inputs = reference.images(arrays), reference.branches(arrays, "eval/z_rand")
        injection, f_rand, logits, z, after = run_evaluation(graphdef, TIGHT, params, variables, *inputs)
    close(injection, reference.branches(arrays, "eval/injection")[0], 1e-10)
    all_close(f_rand, reference.branches(arrays, "eval/f_z_rand"), 1e-10)
    all_close(z, reference.branches(arrays, "eval/z_star"), 1e-8)
    close(theirs(logits), arrays["eval/logits"], 1e-8)
    jax.tree.map(np.testing.assert_array_equal, flat(after), flat(variables))


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.FIXTURES)
def test_training_step(name):
    arrays, table, ((loss, (logits, z, after)), gradient) = trained(name)
    all_close(z, reference.branches(arrays, "train/z_star"), 1e-8)
    close(theirs(logits), arrays["train/logits"], 1e-8)
    close(loss, arrays["train/loss"], 1e-8)
    same_gradients(gradient, arrays, "train", table)
    statistics, expected = flat(after), reference.ours(arrays, "train/after/", table)
    assert set(statistics) == set(expected)
    for path, x in expected.items():
        np.testing.assert_allclose(statistics[path], x, rtol=1e-8, atol=1e-8, err_msg=path)


@pytest.mark.parametrize("name", reference.FIXTURES[:1] + reference.FIXTURES[2:4])
@pytest.mark.slow
def test_unrolled_pretraining(name):
    arrays, table, ((loss, (logits, _, _)), gradient) = trained(name, Unroll(3))
    close(loss, arrays["unroll3_train/loss"], 1e-10)
    close(theirs(logits), arrays["unroll3_train/logits"], 1e-10)
    same_gradients(gradient, arrays, "unroll3_train", table)


@pytest.mark.parametrize("name", ["mdeq_tdeq_cls2"])
@pytest.mark.slow
def test_phantom_gradient(name):
    arrays, table, ((loss, _), gradient) = trained(name, PhantomGradient(steps=5, relaxation=0.7))
    close(loss, arrays["phantom5_tau0.7_train/loss"], 1e-8)
    same_gradients(gradient, arrays, "phantom5_tau0.7_train", table)


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.FIXTURES[:-1])
def test_float32(name):
    arrays = load(name)
    graphdef, params, variables = nnx.split(reference.build(name, wide=False), nnx.Param, ...)
    z_rand = [x.astype(np.float32) for x in reference.branches(arrays, "eval/z_rand")]
    inputs = reference.images(arrays).astype(np.float32), tuple(z_rand)
    injection, f_rand, logits, z, _ = run_evaluation(graphdef, Broyden(tol=1e-6, max_steps=60), params, variables, *inputs)
    assert {x.dtype for x in (injection, *f_rand, logits, *z)} == {jnp.dtype("float32")}
    close(injection, reference.branches(arrays, "eval/injection")[0], 1e-4)
    all_close(f_rand, reference.branches(arrays, "eval/f_z_rand"), 1e-4)
    all_close(z, reference.branches(arrays, "eval/z_star"), 1e-4)
    close(theirs(logits), arrays["eval/logits"], 1e-4)


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
    """With running statistics: with those of a batch of two images, rounded weights would change the gradients by a seventh."""
    arrays, solver, results = load("mdeq_tdeq_cls2"), Broyden(tol=3e-3, max_steps=40), {}
    inputs = reference.images(arrays).astype(np.float32), jnp.asarray(arrays["y"])
    for dtype in ("float32", "bfloat16"):
        model = nnx.split(reference.build("mdeq_tdeq_cls2", wide=False, dtype=dtype), nnx.Param, ...)
        results[dtype] = run_training(model[0], solver, Implicit(), *model[1:], *inputs, key=None)
    (loss, (logits, z, after)), gradient = results["bfloat16"]
    assert {x.dtype for x in jax.tree.leaves((loss, logits, z, after, gradient))} == {jnp.dtype("float32")}
    for x, expected in zip(z, reference.branches(arrays, "eval/z_star"), strict=True):
        assert np.linalg.norm(x - expected) < 2e-2 * np.linalg.norm(expected)
    np.testing.assert_allclose(loss, arrays["eval/loss"], rtol=2e-2)
    found, expected = (np.concatenate([x.ravel() for x in flat(g).values()]) for g in (gradient, results["float32"][1]))
    assert 0 < np.linalg.norm(found - expected) < 3e-2 * np.linalg.norm(expected)
