"""Linear layers, with or without weight normalization, and the initialization of parameters.

I, O: input and output features.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from deq_flax.nn.precision import contract

Split = Literal["outputs", "inputs"]
"""The features of a layer that may be split over the mesh axis `tensor`."""

Axes = tuple[str | None, ...]
"""The mesh axis that each axis of a parameter may be split over, or None."""

TENSOR = "tensor"


def normal_param(key: jax.Array, shape: tuple[int, ...], std: float, *, axes: Axes = ()) -> nnx.Param[jax.Array]:
    """A float32 Param drawn from N(0, std^2)."""
    return _param(std * jax.random.normal(key, shape, jnp.float32), axes)


def uniform_param(key: jax.Array, shape: tuple[int, ...], *, axes: Axes = ()) -> nnx.Param[jax.Array]:
    """A float32 kernel (..., O) drawn uniformly from +-1/sqrt(n), n the inputs of one output."""
    limit = math.prod(shape[:-1]) ** -0.5
    return _param(jax.random.uniform(key, shape, jnp.float32, -limit, limit), axes)


def zeros_param(shape: tuple[int, ...], *, axes: Axes = ()) -> nnx.Param[jax.Array]:
    """A float32 Param of zeros."""
    return _param(jnp.zeros(shape, jnp.float32), axes)


def gain_param(v: nnx.Param[jax.Array], *, axes: Axes = ()) -> nnx.Param[jax.Array]:
    """The gain g (O,) with which the weight-normalized kernel starts as v (..., O)."""
    return _param(_norm(v[...]), axes)


def weight_normalized(v: nnx.Param[jax.Array], g_O: nnx.Param[jax.Array]) -> jax.Array:
    """The kernel g v / ||v||, (..., O): weight normalization (Salimans and Kingma 2016, arXiv:1602.07868).

    The norm is over all axes of v but the last. `nnx.WeightNorm` does not serve here: it overwrites the kernel in place, which
    fails inside the loop of a solver, and its gains are not Params. v and g are Params, and the kernel is computed from them
    once per solve, not once per evaluation of f.
    """
    direction = v[...]
    return direction * jnp.expand_dims(g_O[...] / _norm(direction), tuple(range(direction.ndim - 1)))


class Linear(nnx.Module):
    """x (..., I) -> x @ kernel_IO + bias_O.

    Plain: `weight_IO` ~ N(0, init_std^2). With weight normalization (see `weight_normalized`): `v_IO` uniform in +-1/sqrt(I),
    or N(0, init_std^2) if not `uniform`, and `g_O` = ||v||. Biases start at 0.

    Inside a fixed-point solve, call `kernel()` once beforehand and contract with the result.

    Args:
      split: the features that may be split over the mesh axis `tensor`, stored as `out_sharding` metadata of the Params; None:
        the layer is not split.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        use_bias: bool = True,
        weight_norm: bool = False,
        uniform: bool = True,
        init_std: float = 0.01,
        split: Split | None = None,
        rngs: nnx.Rngs,
    ):
        self.weight_norm = weight_norm
        key, shape = rngs.params(), (d_in, d_out)
        axes = (TENSOR if split == "inputs" else None, TENSOR if split == "outputs" else None)
        if weight_norm:
            self.v_IO = uniform_param(key, shape, axes=axes) if uniform else normal_param(key, shape, init_std, axes=axes)
            self.g_O = gain_param(self.v_IO, axes=axes[1:])
        else:
            self.weight_IO = normal_param(key, shape, init_std, axes=axes)
        self.bias_O: nnx.Param[jax.Array] | None = zeros_param((d_out,), axes=axes[1:]) if use_bias else None

    def kernel(self) -> jax.Array:
        """The effective kernel (I, O)."""
        return weight_normalized(self.v_IO, self.g_O) if self.weight_norm else self.weight_IO[...]

    def __call__(self, x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """(..., I) -> (..., O); `dtype` as in `contract`."""
        y = contract("...i,io->...o", x, self.kernel(), dtype)
        if self.bias_O is None:
            return y
        return y + self.bias_O[...].reshape((1,) * (y.ndim - 1) + (-1,))


def whole(x: jax.Array) -> jax.Array:
    """Return x, which the compiler is not to split where the mesh axis `tensor` is all that is left to it; elsewhere, x.

    Left alone, TPU's compiler splits the states between two layers that are split: a gather before and a sum after each norm.
    """
    left = jax.sharding.get_abstract_mesh().auto_axes
    return jax.lax.with_sharding_constraint(x, P()) if left == (TENSOR,) else x


def _param(value: jax.Array, axes: Axes) -> nnx.Param[jax.Array]:
    """A Param, with metadata if one of its axes may be split. Not eager: `value` may be traced, or there may be no mesh."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False) if any(axes) else nnx.Param(value)


def _norm(v: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(v).sum(tuple(range(v.ndim - 1))))
