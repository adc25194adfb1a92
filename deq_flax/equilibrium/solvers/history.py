"""Reading a solver's history: m rows of N elements for each of B samples, by inner products and as a combination."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

ROW_BY_ROW_FROM = 2**21
"""Elements of all samples from which a TPU reads the rows one by one: its vector memory does not hold many such rows, and from
the other memory its compiler reads them at half the speed if it reads them together."""


def dots(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Return the inner products (B, m) of each row of (B, m, N) with x (B, N)."""

    def one_by_one(rows: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.stack([(rows[:, i] * x).sum(-1) for i in range(rows.shape[1])], axis=1)

    return _read(one_by_one, partial(jnp.einsum, "bmn,bn->bm"), rows, x)


def combined(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the sum (B, N) of the rows (B, m, N) times their weights (B, m)."""

    def one_by_one(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.asarray(sum(rows[:, i] * weights[:, i, None] for i in range(rows.shape[1])))

    return _read(one_by_one, lambda rows, weights: jnp.einsum("bm,bmn->bn", weights, rows), rows, weights)


def _read(one_by_one: Callable[..., jax.Array], at_once: Callable[..., jax.Array], rows: jax.Array, x: jax.Array) -> jax.Array:
    batch, _, size = rows.shape
    if batch == 1 or batch * size < ROW_BY_ROW_FROM:  # one sample alone fills an eighth of a register
        return at_once(rows, x)
    return jax.lax.platform_dependent(rows, x, tpu=one_by_one, default=at_once)
