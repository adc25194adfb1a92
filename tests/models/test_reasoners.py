"""Laws of the models of puzzles: the equation is that of the paper, injected with the puzzle, for every size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax import Picard, Unroll, fixed_point
from deq_flax.models import MODELS, build_model
from deq_flax.models.two_level_reasoner import Levels
from deq_flax.nn.normalization import EPSILON
from tests.cases import others_slow
from tests.reference import QUICK_COMPILE

SYMBOLS = {"input_symbols": 4, "output_symbols": 3}
SMALL = {
    "conv_reasoner": dict(width=6, axes=2, blocks=1),
    "attention_reasoner": dict(width=8, heads=2, positions="grid", blocks=2),
    "two_level_reasoner": dict(width=8, heads=2, low_steps=2, relaxation=0.9),
}
INPUTS = np.random.default_rng(0).integers(0, 4, (2, 5, 4))


def make(name, **changed):
    return build_model(MODELS[name].Options(**{"name": name} | SYMBOLS | SMALL[name] | changed), rngs=nnx.Rngs(0))


def unrolled(steps):
    return lambda f, z0, *inputs: (fixed_point(f, z0, *inputs, gradient=Unroll(steps)), None)


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


@pytest.mark.parametrize("name", others_slow(SMALL, ["two_level_reasoner"]))
def test_a_call_reads_the_state_that_the_solve_returns(name):
    model = make(name, halting=True)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run():
        f, z0, _ = model.equation(INPUTS)
        output, expected = model(INPUTS, solve=unrolled(2)), f(f(z0))
        continued, at_once = model(INPUTS, output.state, solve=unrolled(1)), f(expected)
        return output, expected, model.read(expected), continued.logits, model.answer(at_once)[0]

    output, expected, features, continued, at_once = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), output.state, expected)
    logits = np.asarray(features) @ np.asarray(model.head.weight_IO[...]) + np.asarray(model.head.bias_O[...])
    np.testing.assert_allclose(output.logits, logits, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(output.halt_B, [-5.0, -5.0], atol=1e-6)  # nothing is taken for right at first
    np.testing.assert_allclose(continued, at_once, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_the_puzzle_is_injected_and_samples_do_not_meet(name):
    model = make(name)
    other = INPUTS.copy()
    other[0, 0, 0] = (other[0, 0, 0] + 1) % 4
    run = jax.jit(lambda inputs: model(inputs, solve=unrolled(3)).logits, compiler_options=QUICK_COMPILE)
    one, two = run(INPUTS), run(other)
    assert np.abs(one[0] - two[0]).max() > 1e-3
    np.testing.assert_array_equal(one[1], two[1])


@pytest.mark.parametrize("name", SMALL)
def test_the_start_is_drawn_by_the_key_and_fixed_in_evaluation(name):
    model = make(name)
    a, b, c, d = (model.initial_state(INPUTS, key) for key in (None, None, jax.random.key(1), jax.random.key(2)))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not any(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(c), jax.tree.leaves(d), strict=True))
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(c)])
    assert abs(values.mean()) < 0.2 and abs(values.std() - 1) < 0.2
    if name == "two_level_reasoner":
        assert np.abs(c.high - c.low).max() > 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(make(name, initial="zero").initial_state(INPUTS)))


@pytest.mark.parametrize("gated", [False, True])
def test_the_convolutional_cell_is_the_formula(gated):
    model, z = make("conv_reasoner", gated=gated), np.random.default_rng(1).normal(size=(2, 5, 4, 6)).astype(np.float32)
    x = np.asarray(model.embed(INPUTS))

    def conv(layer, h):
        kernel, padded = np.asarray(layer.kernel_HWIO[...]), np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + 5, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3)]
        return sum(shifted) + np.asarray(layer.bias_O[...])

    relu = lambda h: np.maximum(h, 0)  # noqa: E731
    act = (lambda h: h[..., :6] / (1 + np.exp(-h[..., :6])) * h[..., 6:]) if gated else relu
    h = act(conv(model.join, np.concatenate([z, x], axis=-1)))
    h = relu(h + conv(model.blocks[1], act(conv(model.blocks[0], h))))
    np.testing.assert_allclose(model.evaluate(z, x), rms(z + conv(model.out, h)), rtol=1e-3, atol=1e-4)


def test_a_sequence_is_a_grid_of_one_row():
    """The kernels of one axis see left and right only."""
    model = make("conv_reasoner", axes=1)
    assert model.join.kernel_HWIO.shape == (1, 3, 12, 6)
    z, x = (np.random.default_rng(i).normal(size=(2, 7, 6)).astype(np.float32) for i in range(2))
    after = np.asarray(model.evaluate(z, x))
    assert after.shape == z.shape
    x[0, 0] += 1.0
    moved = np.abs(np.asarray(model.evaluate(z, x)) - after).max(axis=-1)
    assert (moved[0, :5] > 0).all() and not moved[0, 5:].any() and not moved[1].any(), "four convolutions reach four cells"


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_causal_cell_sees_what_comes_before_it_alone(kernel):
    """What follows changes nothing, in any application; and the answer for a cell is that at the end of a shorter sequence."""
    model = make("conv_reasoner", axes=1, kernel=kernel, causal=True, initial="zero")
    z, x = (np.random.default_rng(i).normal(size=(2, 14, 6)).astype(np.float32) for i in range(2))
    after = np.asarray(model.evaluate(z, x))
    x[0, 3] += 1.0
    moved = np.abs(np.asarray(model.evaluate(z, x)) - after).max(axis=-1)
    reach = slice(3, 4 + 4 * (kernel - 1))
    assert (moved[0, reach] > 0).all(), "each of four convolutions reaches kernel - 1 cells"
    assert moved[0].nonzero()[0].tolist() == [*range(reach.start, reach.stop)] and not moved[1].any()
    inputs = np.random.default_rng(2).integers(0, 4, (2, 9))
    run = jax.jit(lambda inputs: model(inputs, solve=unrolled(5)).logits, compiler_options=QUICK_COMPILE)
    np.testing.assert_allclose(run(inputs)[:, :6], run(inputs[:, :6]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="causal is for sequences"):
        make("conv_reasoner", causal=True)


def test_the_two_levels_share_one_network():
    model = make("two_level_reasoner", relaxation=1.0)
    x, (high, low) = model.embed(INPUTS), model.initial_state(INPUTS)
    for _ in range(2):
        low = model.transform(low + high + x)
    expected = Levels(model.transform(high + low), low)
    got = model.evaluate(model.initial_state(INPUTS), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    half = make("two_level_reasoner", relaxation=0.5, low_steps=1)
    z = half.initial_state(INPUTS)
    np.testing.assert_allclose(half.evaluate(z, x).low, 0.5 * z.low + 0.5 * half.transform(z.low + z.high + x), atol=1e-5)


def test_a_contractive_cell_has_one_equilibrium_whatever_the_start():
    """Path independence, where the kernels are small."""
    model = make("conv_reasoner")
    for layer in (model.join, *model.blocks, model.out):
        layer.kernel_HWIO[...] = 0.1 * layer.kernel_HWIO[...]
    model.out.bias_O[...] = jnp.linspace(-3.0, 3.0, 6)  # a direction that the norm keeps
    solve = lambda f, z0, *inputs: (fixed_point(f, z0, *inputs, solver=Picard(tol=1e-6, max_steps=200)), None)  # noqa: E731
    run = jax.jit(lambda z0: model(INPUTS, z0, solve=solve))
    outputs = [run(model.initial_state(INPUTS, jax.random.key(i))) for i in range(2)]
    assert all(output.stats.converged.all() for output in outputs)
    np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("conv_reasoner", {"kernel": 4}, "kernel must be odd"),
        ("conv_reasoner", {"axes": 3}, "axes must be 1 or 2"),
        ("conv_reasoner", {"input_symbols": 0}, "left to the data in a config only"),
        ("attention_reasoner", {"blocks": 0}, "blocks must be at least 1"),
        ("attention_reasoner", {"mixer": "cells"}, "cells is the number of cells"),
        ("two_level_reasoner", {"relaxation": 0.0}, "and relaxation"),
    ],
)
def test_options_out_of_range_are_refused(name, changed, message):
    with pytest.raises(ValueError, match=message):
        make(name, **changed)


def test_puzzles_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"the puzzles have 2 axes, but model\.axes is 1"):
        make("conv_reasoner", axes=1).embed(INPUTS)
    with pytest.raises(ValueError, match=r"the puzzles have 20 cells, but model\.cells is 16"):
        make("attention_reasoner", mixer="cells", cells=16)(INPUTS, solve=unrolled(1))
