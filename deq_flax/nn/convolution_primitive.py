"""A convolution whose derivatives are convolutions of the same layout, of explicitly transposed operands.

JAX differentiates a convolution into ones of permuted axes. XLA has no fast program for these on the CPU and permutes the
operands itself, but not inside a loop: there an adjoint solve took fifty times as long as the forward one. Hence a
primitive of its own: always images (B, H, W, I) and kernels (H, W, I, O), and bilinear, so that all modes of
differentiation follow from its two transposes.

B batch, H height, W width, I and O input and output channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Pair = tuple[int, int]


class Window(NamedTuple):
    """Of each pair, first along H, then along W."""

    strides: Pair
    padding: tuple[Pair, ...]
    x_dilation: Pair = (1, 1)
    kernel_dilation: Pair = (1, 1)


def convolve_nhwc(x_BHWI: jax.Array, kernel_HWIO: jax.Array, window: Window) -> jax.Array:
    """(B, H', W', O), of the operands' type, which they share."""
    return _convolution.bind(x_BHWI, kernel_HWIO, window=window)


def _lax(x, kernel, *, window):
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        lhs_dilation=window.x_dilation,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _abstract(x, kernel, *, window):
    sizes = (
        (_dilated(n, d) + sum(padding) - _dilated(k, kd)) // stride + 1
        for n, k, stride, padding, d, kd in zip(x.shape[1:3], kernel.shape[:2], *window, strict=True)
    )
    return x.update(shape=(x.shape[0], *sizes, kernel.shape[3]))


def _transpose_x(g, x, kernel, *, window):
    padding = []
    for n, k, m, stride, (low, _), d, kd in zip(x.aval.shape[1:3], kernel.shape[:2], g.shape[1:3], *window, strict=True):
        before = _dilated(k, kd) - low - 1
        padding.append((before, _dilated(n, d) + _dilated(k, kd) - 1 - _dilated(m, stride) - before))
    turned = Window(window.x_dilation, tuple(padding), window.strides, window.kernel_dilation)
    return convolve_nhwc(g, jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3), turned)


def _transpose_kernel(g, x, kernel, *, window):
    padding = []
    for n, k, m, stride, (low, _), d, kd in zip(x.shape[1:3], kernel.aval.shape[:2], g.shape[1:3], *window, strict=True):
        padding.append((low, _dilated(m, stride) - _dilated(n, d) + _dilated(k, kd) - low - 1))
    turned = Window(window.kernel_dilation, tuple(padding), window.x_dilation, window.strides)
    # The batch is summed over, as channels are; input channels take its place.
    return convolve_nhwc(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), turned).transpose(1, 2, 0, 3)


def _batch(operands, axes, *, window):
    x, kernel = operands
    if axes[1] is None:
        x = jnp.moveaxis(x, axes[0], 0)
        y = convolve_nhwc(x.reshape(-1, *x.shape[2:]), kernel, window)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    kernel = jnp.moveaxis(kernel, axes[1], 0)
    if axes[0] is None:
        return lax.map(lambda one: convolve_nhwc(x, one, window), kernel), 0
    return lax.map(lambda pair: convolve_nhwc(*pair, window), (jnp.moveaxis(x, axes[0], 0), kernel)), 0


def _dilated(size, dilation):
    return 1 + dilation * (size - 1) if size else 0


_convolution = Primitive("convolution_nhwc")
_convolution.def_impl(jax.jit(_lax, static_argnames="window"))
_convolution.def_abstract_eval(_abstract)
ad.defbilinear(_convolution, _transpose_x, _transpose_kernel)
batching.primitive_batchers[_convolution] = _batch
mlir.register_lowering(_convolution, mlir.lower_fun(_lax, multiple_results=False))
