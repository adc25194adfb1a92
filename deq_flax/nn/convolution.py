"""Convolutions of images, with or without weight normalization, and blocks of convolutions with batch normalization.

B batch, H height, W width, I and O input and output channels; in a kernel, H and W are the kernel's own.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deq_flax.nn.convolution_primitive import Window, convolve_nhwc
from deq_flax.nn.linear import gain_param, normal_param, uniform_param, weight_normalized, zeros_param
from deq_flax.nn.normalization import BatchNorm


class Conv(nnx.Module):
    """A convolution with a square kernel of odd size, padded so that stride 1 keeps the size and stride 2 halves it, upwards.

    Plain: `weight_HWIO` ~ N(0, 0.01^2). With weight normalization (see `weight_normalized`): `v_HWIO` uniform in
    +-1/sqrt(H W I), and `g_O` = ||v||. Biases start at 0.

    Inside a fixed-point solve, call `kernel()` once beforehand and `convolve` with the result.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        stride: int = 1,
        use_bias: bool = False,
        weight_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        self.stride, self.weight_norm = stride, weight_norm
        shape = (size, size, c_in, c_out)
        if weight_norm:
            self.v_HWIO = uniform_param(rngs.params(), shape)
            self.g_O = gain_param(self.v_HWIO)
        else:
            self.weight_HWIO = normal_param(rngs.params(), shape, 0.01)
        self.bias_O = zeros_param((c_out,)) if use_bias else None

    def kernel(self) -> jax.Array:
        """The effective kernel (H, W, I, O)."""
        return weight_normalized(self.v_HWIO, self.g_O) if self.weight_norm else self.weight_HWIO[...]

    def __call__(self, x_BHWI: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """(B, H, W, I) -> (B, H', W', O); `dtype` as in `convolve`."""
        y_BHWO = convolve(x_BHWI, self.kernel(), self.stride, dtype)
        if self.bias_O is None:
            return y_BHWO
        return y_BHWO + self.bias_O[...].astype(y_BHWO.dtype)[None, None, None]


def convolve(
    x_BHWI: jax.Array, kernel_HWIO: jax.Array, stride: int = 1, dtype: DTypeLike | None = None, *, causal: bool = False
) -> jax.Array:
    """The convolution of `Conv` with a given kernel. Given a `dtype`, operands and result are rounded to it.

    `causal`: along W, pad before alone, so that a result depends on its own column and those before it.
    """
    dtype = jnp.promote_types(x_BHWI.dtype, kernel_HWIO.dtype) if dtype is None else dtype
    height, width = (size // 2 for size in kernel_HWIO.shape[:2])
    window = Window((stride, stride), ((height, height), (kernel_HWIO.shape[1] - 1, 0) if causal else (width, width)))
    return convolve_nhwc(x_BHWI.astype(dtype), kernel_HWIO.astype(dtype), window)


class ConvBatchNorm(nnx.Module):
    """A convolution, batch normalization and, if `relu`, a ReLU. The other arguments are those of `Conv` and `BatchNorm`."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        stride: int = 1,
        use_bias: bool = False,
        affine: bool = True,
        relu: bool = True,
        momentum: float = 0.1,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.relu, self.dtype = relu, dtype
        self.conv = Conv(c_in, c_out, size, stride=stride, use_bias=use_bias, rngs=rngs)
        self.norm = BatchNorm(c_out, affine=affine, momentum=momentum)

    def __call__(self, x_BHWI: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, I) -> (B, H', W', O); `train` as in `BatchNorm`."""
        y_BHWO = self.norm(self.conv(x_BHWI, self.dtype), train)
        return jax.nn.relu(y_BHWO) if self.relu else y_BHWO


class Bottleneck(nnx.Module):
    """The bottleneck block of a residual network (He et al. 2016, arXiv:1512.03385), from `c_in` to 4 `width` channels.

    The norms on the residual path have neither scale nor bias, as in the published MDEQ.
    """

    EXPANSION = 4

    def __init__(self, c_in: int, width: int, *, momentum: float = 0.1, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        c_out = self.EXPANSION * width
        self.first = ConvBatchNorm(c_in, width, 1, affine=False, momentum=momentum, dtype=dtype, rngs=rngs)
        self.second = ConvBatchNorm(width, width, 3, affine=False, momentum=momentum, dtype=dtype, rngs=rngs)
        self.third = ConvBatchNorm(width, c_out, 1, affine=False, relu=False, momentum=momentum, dtype=dtype, rngs=rngs)
        self.shortcut = (
            None if c_in == c_out else ConvBatchNorm(c_in, c_out, 1, relu=False, momentum=momentum, dtype=dtype, rngs=rngs)
        )

    def __call__(self, x_BHWI: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, I) -> (B, H, W, 4 width); `train` as in `BatchNorm`."""
        y_BHWO = self.third(self.second(self.first(x_BHWI, train), train), train)
        return jax.nn.relu(y_BHWO + (x_BHWI if self.shortcut is None else self.shortcut(x_BHWI, train)))
