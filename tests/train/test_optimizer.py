"""Laws of the optimizers and schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deq_flax import options
from deq_flax.errors import UserError
from deq_flax.train.optimizer import OptimizerOptions, make_optimizer


def make(steps=100, **section):
    """The optimizer of a section `optimizer` of a config."""
    plain = {"learning_rate": 0.1, "schedule": "constant"}
    return make_optimizer(options.make(OptimizerOptions, plain | section, "optimizer"), steps)


def run(gradient, x0, n, **section):
    """x after n updates on `gradient(x)`, as float64 numpy."""
    optimizer, _ = make(**section)

    @jax.jit
    def step(x, state):
        updates, state = optimizer.update(gradient(x), state, x)
        return optax.apply_updates(x, updates), state

    x = jnp.asarray(x0, jnp.float32)
    state = optimizer.init(x)
    for _ in range(n):
        x, state = step(x, state)
    return np.asarray(x, np.float64)


def numpy_adam(gradient, x, rates, *, l2=0.0, decoupled=0.0, beta2=0.999):
    m = v = np.zeros_like(x)
    for t, rate in enumerate(rates, start=1):
        g = gradient(x) + l2 * x
        m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g * g
        x = x - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - beta2**t)) + 1e-8) + decoupled * x)
    return x


def test_cosine_is_the_published_formula():
    _, rate = make(schedule="cosine", warmup_steps=10, learning_rate=2.5e-4)
    for step in (0, 3, 9):
        assert float(rate(step)) == pytest.approx(2.5e-4 * step / 10, rel=1e-6)
    for step in (10, 40, 99, 100):
        assert float(rate(step)) == pytest.approx(2.5e-4 * 0.5 * (1 + math.cos(math.pi * step / 100)), rel=1e-5, abs=1e-10)
    assert float(rate(150)) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [0.0, 0.05, 0.1, 0.1]), ("linear", [0.0, 0.05, 0.09, 0.05])])
def test_other_schedules_warm_up_too(schedule, expected):
    _, rate = make(schedule=schedule, warmup_steps=10)
    np.testing.assert_allclose([float(rate(s)) for s in (0, 5, 10, 50)], expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "numpy_option", "beta2"), [("adam", "l2", 0.999), ("adamw", "decoupled", 0.95)])
def test_adam_agrees_with_numpy(name, numpy_option, beta2):
    x0 = np.array([1.0, -2.0, 0.5])
    given = dict(name=name, schedule="cosine", warmup_steps=4, weight_decay=0.3, beta2=beta2)
    ours = run(lambda x: 2 * x - 1, x0, 20, **given)
    rates = [0.1 * s / 4 if s < 4 else 0.05 * (1 + math.cos(math.pi * s / 100)) for s in range(20)]
    expected = numpy_adam(lambda x: 2 * x - 1, x0, rates, beta2=beta2, **{numpy_option: 0.3})
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=3e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_momentum_by_hand(nesterov):
    x, velocity = np.array([1.0, -3.0]), np.zeros(2)
    ours = run(lambda x: 2 * x, x, 5, name="sgd", momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    for _ in range(5):
        g = 2 * x + 0.1 * x
        velocity = 0.9 * velocity + g
        x = x - 0.1 * (g + 0.9 * velocity if nesterov else velocity)
    np.testing.assert_allclose(ours, x, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "radam", "lamb"])
def test_each_minimizes_a_quadratic(name):
    x = run(lambda x: x - 3.0, np.array([1.0, 5.0]), 500, name=name, learning_rate=0.2, schedule="linear", steps=500)
    np.testing.assert_allclose(x, 3.0, atol=0.05)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "radam", "lamb"])
def test_weight_decay_pulls_toward_zero(name):
    x = run(lambda x: 0 * x, np.array([1.0, -1.0]), 20, name=name, learning_rate=0.01, weight_decay=0.1)
    assert np.all(np.abs(x) < 1.0)
    assert np.all(np.abs(run(lambda x: 0 * x, np.array([1.0, -1.0]), 5, name=name)) == 1.0)


def test_the_gradient_is_clipped_to_the_global_norm_before_weight_decay():
    x = run(lambda x: jnp.array([30.0, 40.0]), np.array([1.0, 1.0]), 1, name="sgd", clip_norm=0.25, weight_decay=0.5)
    np.testing.assert_allclose(x, 1 - 0.1 * (np.array([0.15, 0.2]) + 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name="adma"), "known: adam, adamw, sgd, radam, lamb"),
        (dict(name="adam", schedule="cosin"), "known: constant, cosine, linear"),
        (dict(name="adam", learning_rate=0.0), "positive"),
        (dict(name="adam", learning_rate=math.nan), "positive"),
        (dict(name="adam", momentum=0.9), "belong to sgd"),
        (dict(name="sgd", nesterov=True), "needs a momentum"),
        (dict(name="adam", clip_norm=-1.0), "negative"),
        (dict(name="adam", warmup_steps=-1), "at least 0"),
        (dict(name="adam", beta2=1.0), "below 1"),
    ],
)
def test_wrong_options_name_the_right_ones(section, message):
    with pytest.raises(UserError, match=message):
        make(**section)
