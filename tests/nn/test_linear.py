"""Laws of the small layers: linear layers, masks, normalization, mixed precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.nn.dropout import apply_mask, check_rate, draw_mask, draw_masks
from deq_flax.nn.linear import Linear
from deq_flax.nn.normalization import layer_norm
from deq_flax.nn.precision import compute_dtype, contract


def test_weight_norm_starts_as_a_plain_layer_and_g_is_its_column_norm():
    layer = Linear(6, 4, weight_norm=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer.kernel(), layer.v_IO[...], rtol=1e-6)
    assert np.abs(layer.v_IO[...]).max() <= 6**-0.5
    layer.v_IO.set_value(3 * layer.v_IO[...])
    layer.g_O.set_value(jnp.arange(1.0, 5.0))
    np.testing.assert_allclose(jnp.linalg.norm(layer.kernel(), axis=0), jnp.arange(1.0, 5.0), rtol=1e-6)


def test_linear_is_kernel_plus_bias():
    layer = Linear(3, 2, rngs=nnx.Rngs(0))
    layer.bias_O.set_value(jnp.array([1.0, 2.0]))
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    np.testing.assert_allclose(layer(x), x @ layer.kernel() + layer.bias_O[...][None, None], rtol=1e-6)


def test_mask_keeps_the_mean_and_is_absent_without_key_or_rate():
    mask = draw_mask(jax.random.key(0), 0.25, (100, 100))
    assert set(np.unique(mask)) == {0.0, np.float32(1) / np.float32(0.75)}
    assert abs(mask.mean() - 1) < 0.03
    assert draw_mask(None, 0.25, (2,)) is None
    a, none, b = draw_masks(jax.random.key(0), (0.5, (4, 8)), (0.0, (3,)), (0.5, (4, 8)))
    assert none is None and (a != b).any()
    assert draw_mask(jax.random.key(0), 0, (2,)) is None
    assert apply_mask(mask, None) is mask


def test_rates_and_types_out_of_range_are_refused():
    with pytest.raises(ValueError, match="dropout must lie"):
        check_rate("dropout", 1.0)
    with pytest.raises(ValueError, match="known: bfloat16, float32"):
        compute_dtype("float8")


def test_layer_norm_has_zero_mean_and_unit_variance():
    y = layer_norm(5 + 3 * jax.random.normal(jax.random.key(0), (2, 3, 64)))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(-1), 1, rtol=1e-5)


def test_contraction_in_bfloat16_returns_float32_and_its_derivatives_are_close():
    a, b, c = (jax.random.normal(key, (8, 8)) for key in jax.random.split(jax.random.key(0), 3))

    def loss(a, b, dtype):
        return jnp.sum(c * contract("ij,jk->ik", a, b, dtype))

    assert contract("ij,jk->ik", a, b, jnp.bfloat16).dtype == jnp.float32
    exact, rough = (jax.grad(loss, argnums=(0, 1))(a, b, dtype) for dtype in (None, jnp.bfloat16))
    for x, y in zip(exact, rough, strict=True):
        assert y.dtype == jnp.float32
        assert np.linalg.norm(x - y) < 1e-2 * np.linalg.norm(x)
    push = jax.jvp(lambda a: loss(a, b, jnp.bfloat16), (a,), (c,))[1]
    np.testing.assert_allclose(push, jnp.vdot(rough[0], c), rtol=1e-2)
