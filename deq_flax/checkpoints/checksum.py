"""Checksums of arrays: CRC-32 of one that a process sees whole, a sum of our own of one spread over several processes."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def describe(leaf: Any, kind: str | None = None) -> dict[str, Any]:
    """Shape, type and checksum of an array, `{"shape": ..., "dtype": ..., kind: number}`.

    Args:
      leaf: an array or a number.
      kind: 'crc32' or 'sum32'; None: crc32, unless the array is spread over processes. The sum is the same however the array
        is divided, and for an array spread over processes all of them must ask for it.
    """
    if jax.dtypes.issubdtype(dtype_of(leaf), jax.dtypes.prng_key):
        raise TypeError("a checkpoint holds random keys as raw bits: pass jax.random.key_data(key)")
    described = {"shape": list(np.shape(leaf)), "dtype": str(dtype_of(leaf))}
    if (kind or ("sum32" if is_spread(leaf) else "crc32")) == "sum32":
        return described | {"sum32": int(_sum32(leaf))}
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0)
    raw = np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8)
    return described | {"crc32": zlib.crc32(raw.data)}


def is_spread(leaf: Any) -> bool:
    """Whether no process sees all of it."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def dtype_of(leaf: Any) -> np.dtype:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


@jax.jit
def _sum32(x: jax.Array) -> jax.Array:
    """Sum modulo 2^32 of a hash of each element and its place.

    For each place the hash is a bijection of the element's bits, so that any one element that changes changes the sum.
    """
    size = x.dtype.itemsize
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(bits, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    hashed = bits ^ (place * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        hashed = (hashed ^ (hashed >> shift)) * jnp.uint32(factor)
    return jnp.sum(hashed, dtype=jnp.uint32)
