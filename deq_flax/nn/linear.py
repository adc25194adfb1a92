"""Affine maps, with or without weight normalisation.

I, O: input and output features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.nn.precision import contract
from deq_flax.nn.weight_norm import norm_param, normalised, uniform_param


def normal_param(key, shape, std):
    """A float32 Param drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


def zeros_param(shape):
    """A float32 Param of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """x_..I -> x @ kernel_IO + bias_O.

    Plain: `weight_IO` ~ N(0, init_std^2). Weight-normalised, see `nn.weight_norm`: v uniform in +-1/sqrt(d_in), or
    N(0, init_std^2) where `uniform` is False. Biases start at 0.

    Inside a fixed-point solve call `kernel()` once beforehand and contract with the result.
    """

    def __init__(self, d_in, d_out, *, use_bias=True, weight_norm=False, uniform=True, init_std=0.01, rngs):
        self.weight_norm = weight_norm
        key, shape = rngs.params(), (d_in, d_out)
        if weight_norm:
            self.v_IO = uniform_param(key, shape) if uniform else normal_param(key, shape, init_std)
            self.g_O = norm_param(self.v_IO)
        else:
            self.weight_IO = normal_param(key, shape, init_std)
        self.bias_O: Any = zeros_param((d_out,)) if use_bias else None

    def kernel(self):
        """The effective kernel (d_in, d_out)."""
        return normalised(self.v_IO, self.g_O) if self.weight_norm else self.weight_IO[...]

    def __call__(self, x, dtype=None):
        """x (..., d_in) -> (..., d_out); `dtype` as in `contract`."""
        y = contract("...i,io->...o", x, self.kernel(), dtype)
        if self.bias_O is None:
            return y
        return y + self.bias_O[...].reshape((1,) * (y.ndim - 1) + (-1,))
