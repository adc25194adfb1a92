"""Resizing of images.

B batch, H height, W width, C channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def resize_bilinear(x_BHWC: jax.Array, size: Sequence[int]) -> jax.Array:
    """Resize (B, H, W, C) to (B, *size, C) by linear interpolation that maps the centers of corner pixels onto each other.

    It is computed as two products with matrices, whose gradient, unlike that of gathered pixels, is deterministic.
    """
    if x_BHWC.shape[1:3] == tuple(size):
        return x_BHWC
    rows, columns = (jnp.asarray(_interpolation(a, b), x_BHWC.dtype) for a, b in zip(x_BHWC.shape[1:3], size, strict=True))
    x_BRWC = jnp.einsum("rh,bhwc->brwc", rows, x_BHWC, precision=lax.Precision.HIGHEST)
    return jnp.einsum("vw,brwc->brvc", columns, x_BRWC, precision=lax.Precision.HIGHEST)


def enlarge_nearest(x_BHWC: jax.Array, size: Sequence[int]) -> jax.Array:
    """Enlarge (B, H, W, C) to (B, *size, C) by repeating pixels a power of two times, then cropping at the end."""
    (batch_size, height, width, channels), (new_height, new_width) = x_BHWC.shape, size
    factor = 1
    while height * factor < new_height or width * factor < new_width:
        factor *= 2
    if batch_size < 8:
        # A TPU then has columns, not samples, beside the channels in its registers, and takes up to five times as long to
        # broadcast within columns, and to sum over them for the gradient, as to put copies side by side.
        x = jnp.concatenate([x_BHWC] * factor, axis=3).reshape(batch_size, height, 1, width * factor, channels)
        x = jnp.concatenate([x] * factor, axis=2)
    else:
        x = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (batch_size, height, factor, width, factor, channels))
    x = x.reshape(batch_size, height * factor, width * factor, channels)
    return x[:, :new_height, :new_width]


def _interpolation(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that interpolates `old` samples at `new` evenly spaced points, the end points included."""
    points = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(points[:, None] - np.arange(old)[None]))
