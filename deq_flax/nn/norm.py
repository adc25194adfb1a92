"""Layer normalisation: without parameters, as the published DEQ-Transformer uses it, and with."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_flax.nn.linear import zeros_param
from deq_flax.nn.precision import wide


def layer_norm(x, epsilon=1e-5):
    """Zero mean and unit (biased) variance along the last axis of x, any shape; computed in float32 or wider."""
    x_wide = wide(x)
    centred = x_wide - x_wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * lax.rsqrt(variance + epsilon)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` times a scale plus a bias, both of size `width`. The scale is drawn from N(1, 0.01^2), the bias is 0."""

    def __init__(self, width, *, rngs):
        self.scale_D = nnx.Param(1 + 0.01 * jax.random.normal(rngs.params(), (width,), jnp.float32))
        self.bias_D = zeros_param((width,))

    def __call__(self, x):
        """x (..., width), of any rank from 1."""
        leading = (1,) * (x.ndim - 1)
        return layer_norm(x) * self.scale_D[...].reshape(*leading, -1) + self.bias_D[...].reshape(*leading, -1)
