"""What an MDEQ makes of its equilibrium: one class for an image, or one for every pixel.

B batch, H height, W width, C channels, K classes. Branches come finest first, each half the size of the one before.
"""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from deq_flax.nn.bottleneck import Bottleneck, ConvBatchNorm
from deq_flax.nn.convolution import Conv
from deq_flax.nn.linear import Linear
from deq_flax.nn.precision import wide


class ClassificationHead(nnx.Module):
    """A bottleneck for every branch, their sum on the way from fine to coarse, the mean over pixels, a linear map.

    Args:
      channels: of the branches.
      head_channels: the bottlenecks' inner width for every branch; four times as many come out.
      final_channels: before the linear map.

    Raises:
      ValueError: head_channels are not one number for every branch.
    """

    def __init__(self, channels, num_classes, *, head_channels, final_channels, momentum, dtype, rngs):
        if len(head_channels) != len(channels) or final_channels < 1:
            raise ValueError(
                "a classification head needs head_channels for each branch and final_channels, "
                f"not {head_channels} and {final_channels} for channels {channels}"
            )
        options = dict(momentum=momentum, dtype=dtype, rngs=rngs)
        self.branches = nnx.List([Bottleneck(c, w, **options) for c, w in zip(channels, head_channels, strict=True)])
        widths = [Bottleneck.EXPANSION * width for width in head_channels]
        self.down = nnx.List([ConvBatchNorm(a, b, 3, stride=2, use_bias=True, **options) for a, b in pairwise(widths)])
        self.final = ConvBatchNorm(widths[-1], final_channels, 1, use_bias=True, **options)
        self.classifier = Linear(final_channels, num_classes, init_std=(3 * final_channels) ** -0.5, rngs=rngs)

    def __call__(self, branches, train):
        """Branches (B, H, W, C) -> logits (B, K)."""
        parts = [layer(x, train) for layer, x in zip(self.branches, branches, strict=True)]
        total = parts[0]
        for part, layer in zip(parts[1:], self.down, strict=True):
            total = part + layer(total, train)
        pooled_BC = wide(self.final(total, train)).mean((1, 2))
        return self.classifier(pooled_BC)


class SegmentationHead(nnx.Module):
    """All branches enlarged to the finest, a 1x1 convolution of them, and one of size `last_kernel` to the classes."""

    def __init__(self, channels, num_classes, *, last_kernel, momentum, dtype, rngs):
        if last_kernel not in (1, 3):
            raise ValueError(f"last_kernel is 1 or 3, not {last_kernel}")
        self.dtype = dtype
        width = sum(channels)
        self.mix = ConvBatchNorm(width, width, 1, use_bias=True, momentum=momentum, dtype=dtype, rngs=rngs)
        self.last = Conv(width, num_classes, last_kernel, use_bias=True, rngs=rngs)

    def __call__(self, branches, train):
        """Branches (B, H, W, C) -> logits (B, H, W, K) at the resolution of the first."""
        size = branches[0].shape[1:3]
        together = jnp.concatenate([resize_bilinear(x, size) for x in branches], axis=-1)
        return wide(self.last(self.mix(together, train), self.dtype))


def resize_bilinear(x_BHWC, size):
    """(B, H, W, C) -> (B, *size, C) by linear interpolation in which the corner pixels' centres stay where they are.

    As two products with matrices, whose gradient, unlike that of gathered pixels, is the same every time.
    """
    if x_BHWC.shape[1:3] == tuple(size):
        return x_BHWC
    rows, columns = (jnp.asarray(_interpolation(a, b), x_BHWC.dtype) for a, b in zip(x_BHWC.shape[1:3], size, strict=True))
    x_BRWC = jnp.einsum("rh,bhwc->brwc", rows, x_BHWC, precision=lax.Precision.HIGHEST)
    return jnp.einsum("vw,brwc->brvc", columns, x_BRWC, precision=lax.Precision.HIGHEST)


def _interpolation(old, new):
    """(new, old): the matrix that interpolates `old` samples at `new` places, the first and last in common."""
    places = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)[None]))
