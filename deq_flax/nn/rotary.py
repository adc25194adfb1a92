"""Rotary positions (Su et al. 2021, arXiv:2104.09864), of sequences and of grids.

B batch, L cells, H heads, E features of a head, F angles (E / 2).
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotary_angles(shape: tuple[int, ...], width: int) -> np.ndarray:
    """Angles (L, F) of the cells of a sequence, (L,), or of a grid, (H, W), row by row.

    The frequencies fall from 1 to 1/10000 in geometric order. On a grid each axis has half of the features.

    Args:
      shape: shape of the puzzle.
      width: features of a head, E, a multiple of twice the number of axes.

    Raises:
      ValueError: width is no such multiple.
    """
    axes = len(shape)
    if width % (2 * axes):
        raise ValueError(f"rotary positions on {axes} axes need a multiple of {2 * axes} features in a head, not {width}")
    count = width // 2 // axes
    frequencies_F = 10_000.0 ** -(np.arange(count) / count)
    places = np.indices(shape).reshape(axes, -1)
    return np.concatenate([place[:, None] * frequencies_F for place in places], axis=1).astype(np.float32)


def rotate(x_BLHE: jax.Array, angles_LF: np.ndarray) -> jax.Array:
    """Rotate each pair of features (i, i + E/2) by its cell's angle: products then depend on differences of positions."""
    first, second = jnp.split(x_BLHE, 2, axis=-1)
    cos, sin = (jnp.asarray(table[None, :, None], x_BLHE.dtype) for table in (np.cos(angles_LF), np.sin(angles_LF)))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
