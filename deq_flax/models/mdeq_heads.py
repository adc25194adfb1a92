"""The heads of an MDEQ: from the branches of its equilibrium to logits, for each image or for each pixel.

B batch, H height, W width, C channels, K classes. Branches are the finest first, each half the size of the one before.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deq_flax.nn.convolution import Bottleneck, Conv, ConvBatchNorm
from deq_flax.nn.linear import Linear
from deq_flax.nn.precision import wide
from deq_flax.nn.resize import resize_bilinear


class ClassificationHead(nnx.Module):
    """One bottleneck per branch, their sum from fine to coarse, the mean over pixels, and a linear layer.

    Args:
      channels: the channels of each branch.
      num_classes: number of classes, K.
      head_channels: inner channels of each branch's bottleneck; four times as many leave it.
      final_channels: channels before the linear layer.
      momentum: as in `BatchNorm`.
      dtype: as in `convolve`.

    Raises:
      ValueError: head_channels are not one number for each branch, or final_channels is less than 1.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        head_channels: Sequence[int],
        final_channels: int,
        momentum: float,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        if len(head_channels) != len(channels) or final_channels < 1:
            raise ValueError(
                "a classification head needs head_channels for each branch and final_channels, "
                f"not {head_channels} and {final_channels} for channels {channels}"
            )
        self.branches = nnx.List(
            [Bottleneck(c, w, momentum=momentum, dtype=dtype, rngs=rngs) for c, w in zip(channels, head_channels, strict=True)]
        )
        widths = [Bottleneck.EXPANSION * width for width in head_channels]
        self.down = nnx.List(
            [
                ConvBatchNorm(a, b, 3, stride=2, use_bias=True, momentum=momentum, dtype=dtype, rngs=rngs)
                for a, b in pairwise(widths)
            ]
        )
        self.final = ConvBatchNorm(widths[-1], final_channels, 1, use_bias=True, momentum=momentum, dtype=dtype, rngs=rngs)
        self.classifier = Linear(final_channels, num_classes, init_std=(3 * final_channels) ** -0.5, rngs=rngs)

    def __call__(self, branches: Sequence[jax.Array], train: bool) -> jax.Array:
        """Branches (B, H, W, C) -> logits (B, K); `train` as in `BatchNorm`."""
        parts = [layer(x, train) for layer, x in zip(self.branches, branches, strict=True)]
        total = parts[0]
        for part, layer in zip(parts[1:], self.down, strict=True):
            total = part + layer(total, train)
        pooled_BC = wide(self.final(total, train)).mean((1, 2))
        return self.classifier(pooled_BC)


class SegmentationHead(nnx.Module):
    """All branches enlarged to the size of the finest, a 1x1 convolution of them, and a last convolution to the classes.

    Args:
      channels: the channels of each branch.
      num_classes: number of classes, K.
      last_kernel: size of the last convolution, 1 or 3.
      momentum: as in `BatchNorm`.
      dtype: as in `convolve`.

    Raises:
      ValueError: last_kernel is neither 1 nor 3.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        last_kernel: int,
        momentum: float,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        if last_kernel not in (1, 3):
            raise ValueError(f"last_kernel is 1 or 3, not {last_kernel}")
        self.dtype = dtype
        width = sum(channels)
        self.mix = ConvBatchNorm(width, width, 1, use_bias=True, momentum=momentum, dtype=dtype, rngs=rngs)
        self.last = Conv(width, num_classes, last_kernel, use_bias=True, rngs=rngs)

    def __call__(self, branches: Sequence[jax.Array], train: bool) -> jax.Array:
        """Branches (B, H, W, C) -> logits (B, H, W, K) at the resolution of the finest; `train` as in `BatchNorm`."""
        size = branches[0].shape[1:3]
        together = jnp.concatenate([resize_bilinear(x, size) for x in branches], axis=-1)
        return wide(self.last(self.mix(together, train), self.dtype))
