"""Contractions in a chosen compute type that accumulate, and return, float32; and widening what is not contracted."""

from functools import partial

import jax
import jax.numpy as jnp

COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}
"""What a `dtype` option may name. 'float32' computes in the type of the parameters, float64 too if they are."""


def compute_dtype(name):
    """The type that activations and kernels are cast to before a contraction, or None to leave them as they are."""
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(sorted(COMPUTE_DTYPES))}")
    return COMPUTE_DTYPES[name]


def wide(x):
    """x in float32, or as it is where it is wider: for sums and statistics of what was computed in a narrower type."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def contract(spec, a, b, dtype=None):
    """`jnp.einsum(spec, a, b)`; with a `dtype`, of operands rounded to it, accumulated and returned in float32.

    Its derivatives are contractions of operands rounded to `dtype` too: left to itself, the transpose of a contraction
    that returns float32 would contract in float32.
    """
    if dtype is None:
        return jnp.einsum(spec, a, b)
    return _contract_wide(spec, a.astype(dtype), b.astype(dtype))


def contract_narrow(spec, a, b, dtype=None):
    """As `contract`, but the result stays in `dtype`: for results too large to keep in float32."""
    if dtype is None:
        return jnp.einsum(spec, a, b)
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _contract_wide(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _contract_wide_jvp(spec, primals, tangents):
    a, b = primals
    a_dot, b_dot = tangents
    terms = []
    if not _is_zero(a_dot):
        terms.append(jnp.einsum(spec, a_dot, b).astype(jnp.float32))
    if not _is_zero(b_dot):
        terms.append(jnp.einsum(spec, a, b_dot).astype(jnp.float32))
    primal = _contract_wide(spec, a, b)
    return primal, sum(terms[1:], start=terms[0]) if terms else jnp.zeros_like(primal)


_contract_wide.defjvp(_contract_wide_jvp, symbolic_zeros=True)


def _is_zero(tangent):
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
