"""Normalisation of images: over groups of the channels of one image, or over a batch with running statistics.

B batch, H height, W width, C channels, G groups. Statistics are computed in float32 or wider; the type of the input is kept.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_flax.nn.linear import zeros_param
from deq_flax.nn.precision import wide

EPSILON = 1e-5


class GroupNorm(nnx.Module):
    """Zero mean and unit variance over each group of channels of an image (Wu and He 2018, arXiv:1803.08494).

    `affine`: then a scale and a bias for every channel.

    Raises:
      ValueError: the channels cannot be divided into that many groups.
    """

    def __init__(self, channels, groups, *, affine=True):
        if groups < 1 or channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into {groups} groups")
        self.channels, self.groups = channels, groups
        self.scale_C: Any = _ones_param(channels) if affine else None
        self.bias_C: Any = zeros_param((channels,)) if affine else None

    def __call__(self, x_BHWC):
        """(B, H, W, C) -> (B, H, W, C)."""
        batch_size, height, width, channels = x_BHWC.shape
        x_BPGC = wide(x_BHWC).reshape(batch_size, height * width, self.groups, channels // self.groups)
        mean_BG = x_BPGC.mean((1, 3))
        variance_BG = jnp.square(x_BPGC - mean_BG[:, None, :, None]).mean((1, 3))
        mean_BC, factor_BC = (
            jnp.repeat(a, channels // self.groups, axis=1) for a in (mean_BG, lax.rsqrt(variance_BG + EPSILON))
        )
        return _rescale(x_BHWC, mean_BC, factor_BC, self.scale_C, self.bias_C)


class BatchNorm(nnx.Module):
    """Zero mean and unit variance of each channel over a batch (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Training normalises by the batch (its biased variance) and moves the running mean and *unbiased* variance towards it by
    the share `momentum`; evaluation normalises by these, and leaves them alone. Within a `shard_map` the batch is that of all
    devices together, so that their number does not change what is learnt. Not for the inside of a solve: it ties the members
    of a batch together.
    """

    def __init__(self, channels, *, affine=True, momentum=0.1):
        self.momentum = momentum
        self.scale_C: Any = _ones_param(channels) if affine else None
        self.bias_C: Any = zeros_param((channels,)) if affine else None
        self.mean_C = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.variance_C = nnx.BatchStat(jnp.ones((channels,), jnp.float32))

    def __call__(self, x_BHWC, train):
        """(B, H, W, C) -> (B, H, W, C); `train`, a Python bool, decides which statistics."""
        if train:
            x, mesh = wide(x_BHWC), jax.sharding.get_abstract_mesh()
            parts = tuple(axis for axis in mesh.manual_axes if mesh.shape[axis] > 1)
            mean_C = _mean_over(parts, x.mean((0, 1, 2)))
            variance_C = _mean_over(parts, jnp.square(x - mean_C[None, None, None]).mean((0, 1, 2)))
            devices = math.prod(mesh.shape[axis] for axis in parts)
            self._remember(mean_C, variance_C, x.size // x.shape[-1] * devices)
        else:
            mean_C, variance_C = self.mean_C[...], self.variance_C[...]
        factor_C = lax.rsqrt(variance_C + EPSILON)
        return _rescale(x_BHWC, mean_C[None], factor_C[None], self.scale_C, self.bias_C)

    def _remember(self, mean_C, variance_C, count):
        for running, now in ((self.mean_C, mean_C), (self.variance_C, variance_C * (count / max(count - 1, 1)))):
            old = running[...]
            running[...] = (old + self.momentum * (lax.stop_gradient(now) - old)).astype(old.dtype)


def _mean_over(axes, x):
    """Of all devices along some axes of the mesh."""
    return lax.pmean(x, axes) if axes else x


def _rescale(x_BHWC, mean_BC, factor_BC, scale_C, bias_C):
    """((x - mean) * factor) * scale + bias as one multiplication and one addition per element."""
    if scale_C is not None:
        factor_BC = factor_BC * scale_C[...][None]
    offset_BC = -mean_BC * factor_BC
    if bias_C is not None:
        offset_BC = offset_BC + bias_C[...][None]
    return (x_BHWC * factor_BC[:, None, None] + offset_BC[:, None, None]).astype(x_BHWC.dtype)


def _ones_param(channels):
    return nnx.Param(jnp.ones((channels,), jnp.float32))
