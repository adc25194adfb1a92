"""Variational dropout: a mask drawn once per solve, a constant of the equation whose root is sought."""

import math

import jax
import jax.numpy as jnp


def check_rate(name, rate):
    """Raise ValueError unless `rate` is a probability below one."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}")


def draw_mask(key, rate, shape, dtype=jnp.float32):
    """A mask of `shape` already divided by the keep probability, or None when `rate` is 0 or `key` is None."""
    return draw_masks(key, (rate, shape), dtype=dtype)[0]


def draw_masks(key, *wanted, dtype=jnp.float32):
    """A mask, as of `draw_mask`, for each (rate, shape) wanted: independent, but from one draw.

    One, because each call of a random generator is a large program of its own to compile.
    """
    sizes = [0 if key is None or rate == 0 else math.prod(shape) for rate, shape in wanted]
    if not any(sizes):
        return [None] * len(wanted)
    uniform, start, masks = jax.random.uniform(key, (sum(sizes),), jnp.float32), 0, []
    for (rate, shape), size in zip(wanted, sizes, strict=True):
        kept = uniform[start : start + size].reshape(shape) < 1 - rate if size else None
        masks.append(None if kept is None else kept.astype(dtype) / (1 - rate))
        start += size
    return masks


def apply_mask(x, mask):
    """x times `mask`, of x's rank; x itself where `mask` is None."""
    return x if mask is None else x * mask.astype(x.dtype)
