"""Laws of the layers of reasoning models, each against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.nn import reasoning_block
from deq_flax.nn.normalization import EPSILON, rms_norm
from deq_flax.nn.reasoning_block import Attention, BlockOptions, GatedLayer, ReasoningBlock, angles, attend
from deq_flax.nn.rotary import rotary_angles, rotate


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


def test_rms_norm_has_unit_mean_square_and_keeps_the_type():
    x = 3 * draw(2, 5, 8)
    np.testing.assert_allclose(rms_norm(x), rms(x), rtol=1e-5)
    assert rms_norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_gated_layer_is_swiglu():
    layer = GatedLayer(6, 4.0, 8, rngs=nnx.Rngs(0))
    gate, inner, outer = (np.asarray(part.weight_IO[...]) for part in (layer.gate, layer.inner, layer.outer))
    assert gate.shape == (6, 16), "2/3 of four times as many"
    x = draw(3, 6)
    np.testing.assert_allclose(layer(x), (x @ gate / (1 + np.exp(-x @ gate)) * (x @ inner)) @ outer, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (3, 4)])
def test_rotary_products_depend_on_differences_of_positions_alone(shape):
    """A query and a key at every pair of cells: shifting both by the same step changes nothing."""
    turns = rotary_angles(shape, 8)
    assert turns.shape == (np.prod(shape), 4)
    query, key = (np.broadcast_to(vector, (1, len(turns), 1, 8)) for vector in draw(2, 8))
    products = np.einsum("le,me->lm", rotate(query, turns)[0, :, 0], rotate(key, turns)[0, :, 0])
    places = np.indices(shape).reshape(len(shape), -1).T
    by_difference = {}
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            by_difference.setdefault(tuple(a - b), []).append(products[i, j])
    assert all(np.ptp(values) < 1e-4 for values in by_difference.values())
    assert np.ptp([values[0] for values in by_difference.values()]) > 0.1
    np.testing.assert_allclose(np.linalg.norm(rotate(query, turns), axis=-1), np.linalg.norm(query, axis=-1), rtol=1e-5)


def test_attention_is_a_softmax_over_all_cells():
    layer, x = Attention(8, 2, rngs=nnx.Rngs(0)), draw(2, 5, 8)
    qkv = (x @ np.asarray(layer.query_key_value.weight_IO[...])).reshape(2, 5, 3, 2, 4)
    expected = np.zeros((2, 5, 2, 4))
    for b in range(2):
        for h in range(2):
            q, k, v = (qkv[b, :, i, h] for i in range(3))
            weights = np.exp(q @ k.T / 2)
            expected[b, :, h] = weights / weights.sum(1, keepdims=True) @ v
    expected = expected.reshape(2, 5, 8) @ np.asarray(layer.out.weight_IO[...])
    np.testing.assert_allclose(layer(x, None), expected, rtol=2e-4, atol=1e-5)
    order = np.random.default_rng(1).permutation(5)
    np.testing.assert_allclose(layer(x[:, order], None), layer(x, None)[:, order], rtol=1e-4, atol=1e-5)
    assert np.abs(layer(x[:, order], rotary_angles((5,), 4)) - layer(x, rotary_angles((5,), 4))[:, order]).max() > 1e-3


@pytest.mark.parametrize("samples", [1, 2])
def test_samples_attended_one_after_another_have_the_values_and_derivatives_of_a_batch(monkeypatch, samples):
    """Forward, backward and of second order, by automatic differentiation of the whole batch; 2 leave one of 5 over."""
    qkv, cotangent = (*draw(3, 5, 6, 2, 4),), draw(5, 6, 2, 4)
    tangents = (*0.3 * draw(3, 5, 6, 2, 4)[::-1],)

    def derivatives():
        attended, tangent = jax.jvp(lambda *qkv: attend(*qkv), qkv, tangents)
        gradient = jax.grad(lambda *qkv: jnp.vdot(attend(*qkv), cotangent), argnums=(0, 1, 2))
        return attended, tangent, gradient(*qkv), jax.jvp(gradient, qkv, tangents)[1]

    expected = derivatives()
    monkeypatch.setattr(reasoning_block, "SCORES_AT_ONCE", samples * 2 * 6**2)
    assert "scan" in str(jax.make_jaxpr(attend)(*qkv))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), derivatives(), expected)


def test_attention_keeps_no_scores_of_more_samples_than_are_attended_at_once(monkeypatch):
    qkv = [jax.ShapeDtypeStruct((16, 128, 2, 4), jnp.float32)] * 3

    def temporary():
        gradient = jax.grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(*qkv).compile().memory_analysis().temp_size_in_bytes

    scores = 4 * 2 * 128**2
    assert temporary() > 16 * scores
    monkeypatch.setattr(reasoning_block, "SCORES_AT_ONCE", 2 * 128**2)
    assert temporary() < 6 * scores


@pytest.mark.parametrize("mixer", ["attention", "cells"])
def test_a_block_normalizes_after_both_sums(mixer):
    options = BlockOptions(width=8, heads=2, mixer=mixer)
    block, x = ReasoningBlock(options, cells=5, rngs=nnx.Rngs(0)), draw(2, 5, 8)
    turns = angles(options, (5,))
    assert (turns is None) == (mixer == "cells")
    mixed = block.mixer(x, turns) if mixer == "attention" else np.asarray(block.mixer(x.swapaxes(1, 2))).swapaxes(1, 2)
    h = rms(x + mixed)
    np.testing.assert_allclose(block(x, turns), rms(h + block.gated(h)), rtol=1e-4, atol=1e-5)


def test_bfloat16_rounds_the_contractions_only():
    options = BlockOptions(width=8, heads=2)
    block, x = ReasoningBlock(options, cells=0, rngs=nnx.Rngs(0)), draw(2, 5, 8)
    wide, narrow = block(x, angles(options, (5,))), block(x, angles(options, (5,)), jnp.bfloat16)
    assert narrow.dtype == jnp.float32 and 0 < jnp.abs(narrow - wide).max() < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rotary_angles((3, 3), 6), "need a multiple of 4 features in a head, not 6"),
        (lambda: BlockOptions(width=6, heads=4), "width must be a multiple of heads"),
        (lambda: BlockOptions(width=6, expansion=0.0), "expansion must be positive and"),
        (
            lambda: jax.eval_shape(lambda: angles(BlockOptions(width=6, heads=2), (4,))),
            "multiple of 2 features in a head, not 3",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
