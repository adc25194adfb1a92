"""Affine maps, with or without weight normalisation (Salimans and Kingma 2016, arXiv:1602.07868).

I, O: input and output features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.nn.precision import contract


def normal_param(key, shape, std):
    """A float32 Param drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32))


def zeros_param(shape):
    """A float32 Param of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """x_..I -> x @ kernel_IO + bias_O.

    Plain: `weight_IO` ~ N(0, init_std^2). Weight-normalised: the kernel is g_O * v_IO / ||v_IO||, the norm over inputs,
    with g = ||v||, so that the map starts as if it were plain, and v uniform in +-1/sqrt(d_in), or N(0, init_std^2) where
    `uniform` is False. Biases start at 0.

    Inside a fixed-point solve call `kernel()` once beforehand and contract with the result.
    """

    def __init__(self, d_in, d_out, *, use_bias=True, weight_norm=False, uniform=True, init_std=0.01, rngs):
        self.weight_norm = weight_norm
        if weight_norm:
            limit, key = d_in**-0.5, rngs.params()
            v_IO = jax.random.uniform(key, (d_in, d_out), jnp.float32, -limit, limit)
            if not uniform:
                v_IO = init_std * jax.random.normal(key, (d_in, d_out), jnp.float32)
            self.v_IO = nnx.Param(v_IO)
            self.g_O = nnx.Param(_norm(v_IO))
        else:
            self.weight_IO = normal_param(rngs.params(), (d_in, d_out), init_std)
        self.bias_O: Any = zeros_param((d_out,)) if use_bias else None

    def kernel(self):
        """The effective kernel (d_in, d_out)."""
        if not self.weight_norm:
            return self.weight_IO[...]
        v_IO = self.v_IO[...]
        return v_IO * (self.g_O[...] / _norm(v_IO))[None, :]

    def __call__(self, x, dtype=None):
        """x (..., d_in) -> (..., d_out); `dtype` as in `contract`."""
        y = contract("...i,io->...o", x, self.kernel(), dtype)
        if self.bias_O is None:
            return y
        return y + self.bias_O[...].reshape((1,) * (y.ndim - 1) + (-1,))


def _norm(v_IO):
    return jnp.sqrt(jnp.square(v_IO).sum(0))
