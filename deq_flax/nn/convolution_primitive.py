"""A convolution whose derivatives are convolutions of the same layout, of explicitly transposed operands.

JAX differentiates a convolution into convolutions with permuted axes. On the CPU, XLA has no fast program for these and
permutes the operands itself, but not inside a loop: there an adjoint solve took fifty times as long as the forward solve. Hence
this primitive: its operands are always images (B, H, W, I) and kernels (H, W, I, O), and it is bilinear, so that all modes of
differentiation follow from its two transposes.

B batch, H height, W width, I and O input and output channels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Pair = tuple[int, int]


class Window(NamedTuple):
    """Geometry of a convolution: for each field the value along H, then along W."""

    strides: Pair
    padding: tuple[Pair, ...]
    """(before, after) along each of the two axes."""
    x_dilation: Pair = (1, 1)
    kernel_dilation: Pair = (1, 1)


def convolve_nhwc(x_BHWI: jax.Array, kernel_HWIO: jax.Array, window: Window) -> jax.Array:
    """Convolve images (B, H, W, I) with a kernel (H, W, I, O) of the same type: (B, H', W', O), of that type too."""
    return _convolution.bind(x_BHWI, kernel_HWIO, window=window)


def _lax(x: jax.Array, kernel: jax.Array, *, window: Window) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        lhs_dilation=window.x_dilation,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _abstract(x: Any, kernel: Any, *, window: Window) -> Any:
    """The result's shape and type, from those of the operands."""
    sizes = (
        (_dilated(n, d) + sum(padding) - _dilated(k, kd)) // stride + 1
        for n, k, stride, padding, d, kd in zip(x.shape[1:3], kernel.shape[:2], *window, strict=True)
    )
    return x.update(shape=(x.shape[0], *sizes, kernel.shape[3]))


def _transpose_x(g: jax.Array, x: Any, kernel: jax.Array, *, window: Window) -> jax.Array:
    """The cotangent of x, which is an undefined primal here, from that of the result."""
    padding = []
    for n, k, m, stride, (low, _), d, kd in zip(x.aval.shape[1:3], kernel.shape[:2], g.shape[1:3], *window, strict=True):
        before = _dilated(k, kd) - low - 1
        padding.append((before, _dilated(n, d) + _dilated(k, kd) - 1 - _dilated(m, stride) - before))
    turned = Window(window.x_dilation, tuple(padding), window.strides, window.kernel_dilation)
    return convolve_nhwc(g, jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3), turned)


def _transpose_kernel(g: jax.Array, x: jax.Array, kernel: Any, *, window: Window) -> jax.Array:
    """The cotangent of the kernel, which is an undefined primal here, from that of the result."""
    padding = []
    for n, k, m, stride, (low, _), d, kd in zip(x.shape[1:3], kernel.aval.shape[:2], g.shape[1:3], *window, strict=True):
        padding.append((low, _dilated(m, stride) - _dilated(n, d) + _dilated(k, kd) - low - 1))
    turned = Window(window.kernel_dilation, tuple(padding), window.x_dilation, window.strides)
    # The sum runs over the batch, as it otherwise does over channels: the two trade places.
    return convolve_nhwc(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), turned).transpose(1, 2, 0, 3)


def _batch(operands: Sequence[jax.Array], axes: Sequence[Any], *, window: Window) -> tuple[jax.Array, int]:
    """The rule of `jax.vmap`: a batch of images joins B; a batch of kernels is taken in turn."""
    x, kernel = operands
    if axes[1] is None:
        x = jnp.moveaxis(x, axes[0], 0)
        y = convolve_nhwc(x.reshape(-1, *x.shape[2:]), kernel, window)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    kernel = jnp.moveaxis(kernel, axes[1], 0)
    if axes[0] is None:
        return lax.map(lambda one: convolve_nhwc(x, one, window), kernel), 0
    return lax.map(lambda pair: convolve_nhwc(pair[0], pair[1], window), (jnp.moveaxis(x, axes[0], 0), kernel)), 0


def _dilated(size: int, dilation: int) -> int:
    return 1 + dilation * (size - 1) if size else 0


_convolution = Primitive("convolution_nhwc")
_convolution.def_impl(jax.jit(_lax, static_argnames="window"))
_convolution.def_abstract_eval(_abstract)
ad.defbilinear(_convolution, _transpose_x, _transpose_kernel)
batching.primitive_batchers[_convolution] = _batch
mlir.register_lowering(_convolution, mlir.lower_fun(_lax, multiple_results=False))
