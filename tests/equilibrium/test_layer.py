"""The `Equilibrium` module: gradients of parameters, random streams, aux, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deq_flax import Anderson, Broyden, Equilibrium, Unroll


class Cell(nnx.Module):
    def __init__(self, d, *, rate=0.0, rngs):
        self.linear = nnx.Linear(d, d, rngs=rngs, kernel_init=nnx.initializers.normal(0.5 / d**0.5))
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.dropout(self.linear(z)) + x)


X = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)


@pytest.mark.slow
def test_gradient_of_the_cell_parameters_is_that_of_the_unrolled_cell():
    def gradient(estimator):
        layer = Equilibrium(Cell(8, rngs=nnx.Rngs(0)), solver=Broyden(tol=1e-6), gradient=estimator)
        return nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(jnp.zeros_like(X), X).value ** 2)))(layer)

    ours, unrolled = gradient(None), gradient(Unroll(60))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, unrolled)


@pytest.mark.slow
def test_one_dropout_mask_per_solve_and_a_new_one_for_the_next():
    layer = Equilibrium(Cell(8, rate=0.5, rngs=nnx.Rngs(0)), solver=Anderson(tol=1e-5))
    first, second = (layer(jnp.zeros_like(X), X) for _ in range(2))
    assert first.stats.converged.all() and second.stats.converged.all()
    assert jnp.abs(first.value - second.value).max() > 1e-2


def arrays(module):
    """Return every array of a module's state, those of random streams included, as numpy arrays."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(module)))
    return [np.array(jax.random.key_data(x) if is_key(x) else x) for x in leaves]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_evaluation_changes_nothing_and_training_the_random_stream():
    layer = Equilibrium(Cell(8, rate=0.5, rngs=nnx.Rngs(0)))
    before = arrays(layer)
    evaluation = nnx.view(layer, deterministic=True)
    a, b = (evaluation(jnp.zeros_like(X), X).value for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert equal(arrays(layer), before)
    layer(jnp.zeros_like(X), X)
    assert not equal(arrays(layer), before)


@pytest.mark.slow
def test_a_cell_without_a_batch_axis_and_with_aux():
    """The same as the batched layer, for one sample; aux comes from the same dropout mask as the solve."""

    class Pair(Cell):
        def __call__(self, z, x):
            h = self.dropout(self.linear(z))
            return jnp.tanh(h + x), {"double": 2 * z, "dropped": h == 0}

    make = lambda **options: Equilibrium(Pair(8, rngs=nnx.Rngs(0)), solver=Anderson(tol=1e-6), has_aux=True, **options)  # noqa: E731
    batched, single = make()(jnp.zeros_like(X), X), make(batched=False)(jnp.zeros_like(X[0]), X[0])
    np.testing.assert_allclose(single.value, batched.value[0], rtol=1e-5, atol=1e-6)
    assert single.stats.steps.shape == () and batched.aux["double"].shape == X.shape
    np.testing.assert_allclose(single.aux["double"], 2 * single.value, rtol=1e-6)
    layer = Equilibrium(Pair(8, rate=0.5, rngs=nnx.Rngs(0)), solver=Anderson(tol=1e-6), has_aux=True)
    solution = layer(jnp.zeros_like(X), X)
    dropped = np.asarray(solution.aux["dropped"])
    assert 0 < dropped.mean() < 1
    np.testing.assert_allclose(solution.value[dropped], np.tanh(X)[dropped], rtol=1e-5)


@pytest.mark.slow
def test_trains_inside_a_users_own_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.inject = nnx.Linear(2, 16, rngs=rngs)
            self.layer = Equilibrium(Cell(16, rngs=rngs), solver=Anderson(tol=1e-4, max_steps=30))
            self.head = nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x):
            h = self.inject(x)
            return self.head(self.layer(jnp.zeros_like(h), h).value)[:, 0]

    x = jax.random.normal(jax.random.key(0), (64, 2))
    y = x[:, 0] * x[:, 1]
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(150)]
    assert losses[-1] < 0.2 * losses[0]
