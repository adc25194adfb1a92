"""Convolutions of images, with or without weight normalisation.

B batch, H height, W width, I and O input and output channels; in a kernel H and W are its own.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from deq_flax.nn.convolution_primitive import Window, convolve_nhwc
from deq_flax.nn.linear import normal_param, zeros_param
from deq_flax.nn.weight_norm import norm_param, normalised, uniform_param


class Conv(nnx.Module):
    """A convolution with a square kernel of odd size, padded so that stride 1 keeps the size and stride 2 halves it, up.

    Plain: `weight_HWIO` ~ N(0, 0.01^2). Weight-normalised, see `nn.weight_norm`: v uniform in +-1/sqrt(H W I). Biases start
    at 0.

    Inside a fixed-point solve call `kernel()` once beforehand and `convolve` with the result.
    """

    def __init__(self, c_in, c_out, size, *, stride=1, use_bias=False, weight_norm=False, rngs):
        self.stride, self.weight_norm = stride, weight_norm
        shape = (size, size, c_in, c_out)
        if weight_norm:
            self.v_HWIO = uniform_param(rngs.params(), shape)
            self.g_O = norm_param(self.v_HWIO)
        else:
            self.weight_HWIO = normal_param(rngs.params(), shape, 0.01)
        self.bias_O: Any = zeros_param((c_out,)) if use_bias else None

    def kernel(self):
        """The effective kernel (H, W, I, O)."""
        return normalised(self.v_HWIO, self.g_O) if self.weight_norm else self.weight_HWIO[...]

    def __call__(self, x_BHWI, dtype=None):
        """(B, H, W, I) -> (B, H', W', O); `dtype` as in `convolve`."""
        y_BHWO = convolve(x_BHWI, self.kernel(), self.stride, dtype)
        if self.bias_O is None:
            return y_BHWO
        return y_BHWO + self.bias_O[...].astype(y_BHWO.dtype)[None, None, None]


def convolve(x_BHWI, kernel_HWIO, stride=1, dtype=None):
    """The convolution of `Conv`. With a `dtype`, operands are rounded to it, and so is the result."""
    dtype = jnp.promote_types(x_BHWI.dtype, kernel_HWIO.dtype) if dtype is None else dtype
    height, width = (size // 2 for size in kernel_HWIO.shape[:2])
    window = Window((stride, stride), ((height, height), (width, width)))
    return convolve_nhwc(x_BHWI.astype(dtype), kernel_HWIO.astype(dtype), window)
