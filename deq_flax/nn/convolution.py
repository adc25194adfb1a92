"""Convolutions of images, with or without weight normalisation (Salimans and Kingma 2016, arXiv:1602.07868).

B batch, H height, W width, I and O input and output channels; in a kernel H and W are its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.nn.convolution_primitive import Window, convolve_nhwc
from deq_flax.nn.linear import normal_param, zeros_param


class Conv(nnx.Module):
    """A convolution with a square kernel of odd size, padded so that stride 1 keeps the size and stride 2 halves it, up.

    Plain: `weight_HWIO` ~ N(0, 0.01^2). Weight-normalised: the kernel is g_O * v_HWIO / ||v_HWIO||, the norm over all but
    the last axis, with v uniform in +-1/sqrt(H W I) and g = ||v||, so that the map starts as if it were plain. Biases start
    at 0.

    Inside a fixed-point solve call `kernel()` once beforehand and `convolve` with the result.
    """

    def __init__(self, c_in, c_out, size, *, stride=1, use_bias=False, weight_norm=False, rngs):
        self.stride, self.weight_norm = stride, weight_norm
        shape = (size, size, c_in, c_out)
        if weight_norm:
            limit = (size * size * c_in) ** -0.5
            v_HWIO = jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit)
            self.v_HWIO = nnx.Param(v_HWIO)
            self.g_O = nnx.Param(_norm(v_HWIO))
        else:
            self.weight_HWIO = normal_param(rngs.params(), shape, 0.01)
        self.bias_O: Any = zeros_param((c_out,)) if use_bias else None

    def kernel(self):
        """The effective kernel (H, W, I, O)."""
        if not self.weight_norm:
            return self.weight_HWIO[...]
        v_HWIO = self.v_HWIO[...]
        return v_HWIO * (self.g_O[...] / _norm(v_HWIO))[None, None, None, :]

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


def _norm(v_HWIO):
    return jnp.sqrt(jnp.square(v_HWIO).sum((0, 1, 2)))
