"""Layer normalisation without parameters, as the published DEQ-Transformer uses it."""

import jax.numpy as jnp
from jax import lax


def layer_norm(x, epsilon=1e-5):
    """Zero mean and unit (biased) variance along the last axis of x, any shape; computed in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * lax.rsqrt(variance + epsilon)).astype(x.dtype)
