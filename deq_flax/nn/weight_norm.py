"""Weight normalisation (Salimans and Kingma 2016, arXiv:1602.07868) of kernels of any rank, their outputs the last axis.

The kernel is g_O * v / ||v||, the norm over all axes but the last. With g = ||v|| at the start it starts as v.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def uniform_param(key, shape):
    """A float32 Param to start v as: uniform in +-1/sqrt(inputs of an output)."""
    limit = math.prod(shape[:-1]) ** -0.5
    return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -limit, limit))


def norm_param(v):
    """A Param (O,) to start g as; v is a Param (..., O)."""
    return nnx.Param(_norm(v[...]))


def normalised(v, g_O):
    """The kernel (..., O) of Params v (..., O) and g (O,)."""
    v = v[...]
    return v * jnp.expand_dims(g_O[...] / _norm(v), tuple(range(v.ndim - 1)))


def _norm(v):
    return jnp.sqrt(jnp.square(v).sum(tuple(range(v.ndim - 1))))
