"""Attention, plain and with relative positions (Dai et al. 2019, Transformer-XL, arXiv:1901.02860, section 3.3).

B batch, H heads, Q queries, K keys (first the memory, then the segment: key j is Q - K + j - i positions after query i),
R relative keys (1 + K), F frequencies, E features of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from deq_flax.nn.dropout import apply_mask
from deq_flax.nn.precision import contract

DEFAULT_LOCAL_SIZE = 1000
"""The attention span, in tokens, of local_size 0."""

MASKED = -1e30
"""Number added to the scores of masked keys: finite, so that no NaN arises, and yet its exponential is exactly 0."""


def inverse_frequencies(d_model: int) -> np.ndarray:
    """1 / 10000^(2i/d_model) for i in range(d_model / 2), float32.

    Each operation is rounded to float32 from its float64 value: on every machine, the result of the original single-precision
    code.

    Raises:
      ValueError: d_model is odd.
    """
    if d_model % 2:
        raise ValueError(f"d_model must be even for sinusoidal positions, got {d_model}")
    exponents = np.arange(0, d_model, 2, dtype=np.float32) / np.float32(d_model)
    return np.float32(1) / np.power(10000.0, exponents.astype(np.float64)).astype(np.float32)


def position_encoding(n_keys: int, d_model: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Sinusoidal encoding, (n_keys, d_model), of the distances n_keys - 1 down to 0: sines, then cosines, along features."""
    distances_K = jnp.arange(n_keys - 1, -1, -1).astype(dtype)
    angles_KF = distances_K[:, None] * jnp.asarray(inverse_frequencies(d_model), dtype)[None, :]
    return jnp.concatenate([jnp.sin(angles_KF), jnp.cos(angles_KF)], axis=-1)


def relative_shift(scores_QR: jax.Array) -> jax.Array:
    """Turn scores by distance, (..., Q, R), column 1 + j for distance K - 1 - j, into scores by key, (..., Q, K).

    Column 0 is filler. Row i is shifted left by Q - 1 - i. The entries that enter at the right belong to keys after the query:
    they are meaningless and must be masked. In memory this is one contiguous slice.
    """
    *leading, n_queries, width = scores_QR.shape
    flat = scores_QR.reshape(*leading, n_queries * width)
    return flat[..., n_queries:].reshape(*leading, n_queries, width - 1)


def attention_mask(n_queries: int, n_memory: int, length_B: jax.Array, local_size: int = 0) -> jax.Array:
    """The keys that each query attends to, (B, Q, K) bool, where K = n_memory + n_queries.

    A query attends to the keys up to its own position and less than `local_size` positions before it (0 stands for 1000); of
    the memory, only to the last `length_B` entries.
    """
    span = local_size or DEFAULT_LOCAL_SIZE
    queries_Q = jnp.arange(n_queries) + n_memory
    keys_K = jnp.arange(n_memory + n_queries)
    distance_QK = queries_Q[:, None] - keys_K[None, :]
    near_QK = (distance_QK >= 0) & (distance_QK < span)
    valid_BK = keys_K[None, :] >= n_memory - length_B[:, None]
    return near_QK[None] & valid_BK[:, None, :]


def mask_to_bias(mask_BQK: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The bias (1, B, Q, K) of scores (H, B, Q, K) that implements a mask: 0 where it is True, else about minus infinity."""
    return jnp.where(mask_BQK, jnp.asarray(0, dtype), jnp.asarray(MASKED, dtype))[None]


def relative_attention(
    content_HBQE: jax.Array,
    position_HBQE: jax.Array,
    k_HBKE: jax.Array,
    v_HBKE: jax.Array,
    r_HRE: jax.Array,
    bias_1BQK: jax.Array,
    *,
    probability_mask: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Softmax attention with the scores content . key + position . (relative key of the distance).

    Args:
      content_HBQE: queries plus the content bias, divided by sqrt(E).
      position_HBQE: queries plus the position bias, divided by sqrt(E).
      k_HBKE, v_HBKE: keys and values.
      r_HRE: relative keys, R = 1 + K: a filler row, then distances K - 1 down to 0 (see `relative_shift`).
      bias_1BQK: added to the scores, from `mask_to_bias`.
      probability_mask: a dropout mask (H, B, Q, K) of the probabilities.
      dtype: compute type of the contractions; None: that of the arguments. The softmax is float32 or wider.

    Returns:
      The attended values, (B, Q, H, E).
    """
    by_content = contract("hbqe,hbke->hbqk", content_HBQE, k_HBKE, dtype)
    by_distance = contract("hbqe,hre->hbqr", position_HBQE, r_HRE, dtype)
    scores_HBQK = by_content + relative_shift(by_distance) + bias_1BQK
    return weighted_values(scores_HBQK, v_HBKE, probability_mask=probability_mask, dtype=dtype)


def attention(
    q_HBQE: jax.Array,
    k_HBKE: jax.Array,
    v_HBKE: jax.Array,
    bias_1BQK: jax.Array,
    *,
    probability_mask: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Softmax attention with the scores query . key, of queries that are divided by sqrt(E); otherwise `relative_attention`."""
    scores_HBQK = contract("hbqe,hbke->hbqk", q_HBQE, k_HBKE, dtype) + bias_1BQK
    return weighted_values(scores_HBQK, v_HBKE, probability_mask=probability_mask, dtype=dtype)


def weighted_values(
    scores_HBQK: jax.Array, v_HBKE: jax.Array, *, probability_mask: jax.Array | None, dtype: DTypeLike | None
) -> jax.Array:
    """The values weighted by the softmax of the scores, (B, Q, H, E)."""
    # The sum is divided by only after the values are weighted: Q x E divisions instead of Q x K.
    weights_HBQK = jnp.exp(scores_HBQK - lax.stop_gradient(scores_HBQK.max(-1, keepdims=True)))
    total_HBQ1 = weights_HBQK.sum(-1, keepdims=True)
    attended_HBQE = contract("hbqk,hbke->hbqe", apply_mask(weights_HBQK, probability_mask), v_HBKE, dtype) / total_HBQ1
    return attended_HBQE.transpose(1, 2, 0, 3)
