"""Variational dropout: a mask drawn once per solve, a constant of the equation whose root is sought."""

import jax
import jax.numpy as jnp


def check_rate(name, rate):
    """Raise ValueError unless `rate` is a probability below one."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}")


def draw_mask(key, rate, shape, dtype=jnp.float32):
    """A mask of `shape` already divided by the keep probability, or None when `rate` is 0 or `key` is None."""
    if key is None or rate == 0:
        return None
    keep = 1 - rate
    return jax.random.bernoulli(key, keep, shape).astype(dtype) / keep


def apply_mask(x, mask):
    """x times `mask`, of x's rank; x itself where `mask` is None."""
    return x if mask is None else x * mask.astype(x.dtype)
