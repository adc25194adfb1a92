"""Variational dropout: masks are drawn once per solve, so that they are constants of the equation.

A mask redrawn at each evaluation would leave f without a fixed point.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deq_flax.nn.linear import whole


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless `rate` is a probability below one."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {rate}")


def draw_mask(key: jax.Array | None, rate: float, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array | None:
    """A mask of `shape`, divided by the probability of keeping an entry; None if `rate` is 0 or `key` is None."""
    return draw_masks(key, (rate, shape), dtype=dtype)[0]


def draw_masks(
    key: jax.Array | None, *wanted: tuple[float, tuple[int, ...]], dtype: DTypeLike = jnp.float32
) -> list[jax.Array | None]:
    """A mask as in `draw_mask` for each (rate, shape): independent, but from a single draw.

    All come from one draw because each call of a random generator is a large program to compile.
    """
    sizes = [0 if key is None or rate == 0 else math.prod(shape) for rate, shape in wanted]
    if key is None or not any(sizes):
        return [None] * len(wanted)
    uniform, start = whole(jax.random.uniform(key, (sum(sizes),), jnp.float32)), 0
    masks: list[jax.Array | None] = []
    for (rate, shape), size in zip(wanted, sizes, strict=True):
        kept = uniform[start : start + size].reshape(shape) < 1 - rate if size else None
        masks.append(None if kept is None else kept.astype(dtype) / (1 - rate))
        start += size
    return masks


def apply_mask(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Multiply x by a mask of the same rank; without a mask, x is returned as it is."""
    return x if mask is None else x * mask.astype(x.dtype)
