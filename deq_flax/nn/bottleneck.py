"""Convolutions with batch normalisation: what goes before and after an equilibrium of images.

B batch, H height, W width, I and O input and output channels.
"""

import jax
from flax import nnx

from deq_flax.nn.convolution import Conv
from deq_flax.nn.image_norm import BatchNorm


class ConvBatchNorm(nnx.Module):
    """A convolution and batch normalisation, with ReLU if `relu`."""

    def __init__(self, c_in, c_out, size, *, stride=1, use_bias=False, affine=True, relu=True, momentum=0.1, dtype=None, rngs):
        self.relu, self.dtype = relu, dtype
        self.conv = Conv(c_in, c_out, size, stride=stride, use_bias=use_bias, rngs=rngs)
        self.norm = BatchNorm(c_out, affine=affine, momentum=momentum)

    def __call__(self, x_BHWI, train):
        """(B, H, W, I) -> (B, H', W', O)."""
        y_BHWO = self.norm(self.conv(x_BHWI, self.dtype), train)
        return jax.nn.relu(y_BHWO) if self.relu else y_BHWO


class Bottleneck(nnx.Module):
    """Four times `width` channels of any number (He et al. 2016, arXiv:1512.03385), at the same resolution.

    The norms on the residual path have neither scale nor bias, as in the published MDEQ.
    """

    EXPANSION = 4

    def __init__(self, c_in, width, *, momentum=0.1, dtype=None, rngs):
        c_out = self.EXPANSION * width
        options = dict(momentum=momentum, dtype=dtype, rngs=rngs)
        self.first = ConvBatchNorm(c_in, width, 1, affine=False, **options)
        self.second = ConvBatchNorm(width, width, 3, affine=False, **options)
        self.third = ConvBatchNorm(width, c_out, 1, affine=False, relu=False, **options)
        self.shortcut = None if c_in == c_out else ConvBatchNorm(c_in, c_out, 1, relu=False, **options)

    def __call__(self, x_BHWI, train):
        """(B, H, W, I) -> (B, H, W, 4 width)."""
        y_BHWO = self.third(self.second(self.first(x_BHWI, train), train), train)
        return jax.nn.relu(y_BHWO + (x_BHWI if self.shortcut is None else self.shortcut(x_BHWI, train)))
