"""Normalization over features, over groups of channels, and over a batch of images.

B batch, H height, W width, C channels, P pixels, G groups, D features. Statistics are computed in float32 or wider; the type of
the input is kept.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_flax.nn.linear import zeros_param
from deq_flax.nn.precision import wide

EPSILON = 1e-5
"""Added to variances and mean squares."""


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalize x, of any shape, to zero mean and unit (biased) variance along its last axis.

    Without parameters, as the published DEQ-Transformer uses it.
    """
    x_wide = wide(x)
    centered = x_wide - x_wide.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return (centered * lax.rsqrt(variance + EPSILON)).astype(x.dtype)


def rms_norm(x: jax.Array) -> jax.Array:
    """Divide x, of any shape, by its root mean square along the last axis (Zhang and Sennrich 2019, arXiv:1910.07467).

    Without parameters, as models of recurrent depth use it after each residual sum: it bounds their states.
    """
    x_wide = wide(x)
    return (x_wide * lax.rsqrt(jnp.square(x_wide).mean(-1, keepdims=True) + EPSILON)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` followed by a scale and a bias for each feature.

    The scale starts as N(1, 0.01^2), the bias at 0. Not `nnx.LayerNorm`, which rounds differently and names its parameters
    otherwise than stored checkpoints do.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale_D = nnx.Param(1 + 0.01 * jax.random.normal(rngs.params(), (width,), jnp.float32))
        self.bias_D = zeros_param((width,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., D)."""
        leading = (1,) * (x.ndim - 1)
        return layer_norm(x) * self.scale_D[...].reshape(*leading, -1) + self.bias_D[...].reshape(*leading, -1)


class RMSNorm(nnx.Module):
    """`rms_norm` followed by a scale for each feature, which starts at 1."""

    def __init__(self, width: int):
        self.scale_D = _ones_param(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., D)."""
        return rms_norm(x) * self.scale_D[...].reshape(*(1,) * (x.ndim - 1), -1)


class GroupNorm(nnx.Module):
    """Zero mean and unit variance over each group of channels of an image (Wu and He 2018, arXiv:1803.08494).

    The variance is the mean square less the squared mean, so that one pass over the image gives both, which TPU's compiler
    makes part of the convolution before it. Of a group whose mean is m standard deviations it has a relative error of about
    m^2 times that of the type.

    Args:
      affine: add a scale and a bias for each channel.

    Raises:
      ValueError: the channels cannot be divided into that many groups.
    """

    def __init__(self, channels: int, groups: int, *, affine: bool = True):
        if groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into {groups} groups")
        self.channels, self.groups = channels, groups
        self.scale_C = _ones_param(channels) if affine else None
        self.bias_C = zeros_param((channels,)) if affine else None

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = wide(x_BHWC)
        mean_BC, square_BC = (self._over_groups(moment.mean((1, 2))) for moment in (x, jnp.square(x)))
        factor_BC = lax.rsqrt(_variance(mean_BC, square_BC) + EPSILON)
        return _rescale(x_BHWC, mean_BC, factor_BC, self.scale_C, self.bias_C)

    def _over_groups(self, x_BC: jax.Array) -> jax.Array:
        """The mean over the group of each channel, (B, C), as products: to cut the channels would move them between lanes."""
        size = self.channels // self.groups
        member_CG = jnp.repeat(jnp.eye(self.groups, dtype=x_BC.dtype), size, axis=0)
        mean_BG = jnp.matmul(x_BC, member_CG, precision="highest") / size
        return jnp.matmul(mean_BG, member_CG.T, precision="highest")


class BatchNorm(nnx.Module):
    """Zero mean and unit variance of each channel over a batch (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Training normalizes by the biased variance of the batch and moves the running mean and the *unbiased* variance toward the
    batch's by the share `momentum`; evaluation normalizes by the running statistics and leaves them unchanged. `nnx.BatchNorm`
    keeps the biased variance, so it would not reproduce the published models.

    Within a `shard_map` the batch is that of all devices together, so that the result does not depend on their number; one
    exchange gives mean and mean square, and both the variance, as in `GroupNorm`. Not for use inside a solve: it makes the
    samples of a batch depend on each other.
    """

    def __init__(self, channels: int, *, affine: bool = True, momentum: float = 0.1):
        self.momentum = momentum
        self.scale_C = _ones_param(channels) if affine else None
        self.bias_C = zeros_param((channels,)) if affine else None
        self.mean_C = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.variance_C = nnx.BatchStat(jnp.ones((channels,), jnp.float32))

    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C); `train` selects the statistics of the batch and updates the running ones."""
        if train:
            x, mesh = wide(x_BHWC), jax.sharding.get_abstract_mesh()
            parts = tuple(axis for axis in mesh.manual_axes if mesh.shape[axis] > 1)
            mean_C, square_C = _mean_over(parts, jnp.stack([x.mean((0, 1, 2)), jnp.square(x).mean((0, 1, 2))]))
            variance_C = _variance(mean_C, square_C)
            devices = math.prod(mesh.shape[axis] for axis in parts)
            self._update(mean_C, variance_C, x.size // x.shape[-1] * devices)
        else:
            mean_C, variance_C = self.mean_C[...], self.variance_C[...]
        factor_C = lax.rsqrt(variance_C + EPSILON)
        return _rescale(x_BHWC, mean_C[None], factor_C[None], self.scale_C, self.bias_C)

    def _update(self, mean_C: jax.Array, variance_C: jax.Array, count: int) -> None:
        """Move the running statistics toward those of a batch of `count` pixels."""
        for running, now in ((self.mean_C, mean_C), (self.variance_C, variance_C * (count / max(count - 1, 1)))):
            old = running[...]
            # Not running[...] = x, which asks a traced x for its sharding: JAX then looks where it came from, for 30 ms.
            running.set_value((old + self.momentum * (lax.stop_gradient(now) - old)).astype(old.dtype))


def _variance(mean: jax.Array, square: jax.Array) -> jax.Array:
    """The variance from the mean and the mean square, which rounding must not make negative."""
    return jnp.maximum(square - jnp.square(mean), 0.0)


def _mean_over(axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    """The mean of x over all devices along `axes` of the mesh."""
    return lax.pmean(x, axes) if axes else x


def _rescale(
    x_BHWC: jax.Array,
    mean_BC: jax.Array,
    factor_BC: jax.Array,
    scale_C: nnx.Param[jax.Array] | None,
    bias_C: nnx.Param[jax.Array] | None,
) -> jax.Array:
    """((x - mean) * factor) * scale + bias, as one multiplication and one addition per element. B may be 1."""
    if scale_C is not None:
        factor_BC = factor_BC * scale_C[...][None]
    offset_BC = -mean_BC * factor_BC
    if bias_C is not None:
        offset_BC = offset_BC + bias_C[...][None]
    return (x_BHWC * factor_BC[:, None, None] + offset_BC[:, None, None]).astype(x_BHWC.dtype)


def _ones_param(channels: int) -> nnx.Param[jax.Array]:
    return nnx.Param(jnp.ones((channels,), jnp.float32))
