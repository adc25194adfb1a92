"""Mixed precision: contractions in a narrow type that accumulate, and return, float32."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

COMPUTE_DTYPES: dict[str, DTypeLike | None] = {"float32": None, "bfloat16": jnp.bfloat16}
"""Types by the name that an option `dtype` takes. 'float32' computes in the type of the parameters, be it float64."""


def compute_dtype(name: str) -> DTypeLike | None:
    """The type that operands of a contraction are rounded to; None: they are left as they are.

    Raises:
      ValueError: the type is not one of `COMPUTE_DTYPES`.
    """
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(sorted(COMPUTE_DTYPES))}")
    return COMPUTE_DTYPES[name]


def wide(x: jax.Array) -> jax.Array:
    """Convert x to float32 unless its type is wider: for sums and statistics of results in a narrow type."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def contract(spec: str, a: jax.Array, b: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.einsum(spec, a, b)`; given a `dtype`, of operands rounded to it, accumulated and returned in float32.

    Its derivatives are contractions of operands rounded to `dtype`, too: JAX's own transpose of a contraction that returns
    float32 would contract in float32.
    """
    if dtype is None:
        return jnp.einsum(spec, a, b)
    return _contract_wide(spec, a.astype(dtype), b.astype(dtype))


def contract_narrow(spec: str, a: jax.Array, b: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """`contract` with a result that stays in `dtype`: for results too large to keep in float32."""
    if dtype is None:
        return jnp.einsum(spec, a, b)
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _contract_wide(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _contract_wide_jvp(
    spec: str, primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
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


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
