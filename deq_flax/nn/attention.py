"""Attention with relative positions (Dai et al. 2019, Transformer-XL, arXiv:1901.02860, section 3.3).

B batch, H heads, Q queries, K keys (memory then current, so key j lies Q - K + j - i positions after query i),
D model features, E features of a head, M memory.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_flax.nn.dropout import apply_mask
from deq_flax.nn.precision import contract

EVERY_LOCAL_SIZE = 1000
"""The attention span that local_size 0 stands for."""

NEVER = -1e30
"""Added to the scores of keys that may not be seen: exp of it is exactly 0, and no nan comes of it."""


def inverse_frequencies(d_model):
    """1 / 10000^(2i/d) for i in range(d / 2), float32.

    Each operation is rounded to float32 from its float64 value: what single-precision code of the original gives, on any
    machine.
    """
    if d_model % 2:
        raise ValueError(f"d_model must be even for sinusoidal positions, got {d_model}")
    exponents = np.arange(0, d_model, 2, dtype=np.float32) / np.float32(d_model)
    return np.float32(1) / np.power(10000.0, exponents.astype(np.float64)).astype(np.float32)


def position_encoding(n_keys, d_model, dtype=jnp.float32):
    """(n_keys, d_model): [sin; cos] along features for the distances n_keys - 1 down to 0."""
    distances_K = jnp.arange(n_keys - 1, -1, -1).astype(dtype)
    angles_KF = distances_K[:, None] * jnp.asarray(inverse_frequencies(d_model), dtype)[None, :]
    return jnp.concatenate([jnp.sin(angles_KF), jnp.cos(angles_KF)], axis=-1)


def relative_shift(scores_R):
    """Align scores by distance with keys: (..., Q, 1 + K), whose column 1 + j is distance K - 1 - j, -> (..., Q, K).

    Column 0 is filler. Row i is shifted left by Q - 1 - i, and what comes in at the right, keys after the query, is
    meaningless and must be masked. In memory this is one contiguous slice.
    """
    *leading, n_queries, width = scores_R.shape
    flat = scores_R.reshape(*leading, n_queries * width)
    return flat[..., n_queries:].reshape(*leading, n_queries, width - 1)


def attention_mask(n_queries, n_memory, length_B, local_size=0):
    """(B, Q, K) bool, which keys each query may see: K = n_memory + n_queries.

    A key is seen if it is not after the query, is fewer than `local_size` positions before it, and if it is a memory key, is
    among the last `length_B` of the memory.
    """
    span = local_size or EVERY_LOCAL_SIZE
    queries_Q = jnp.arange(n_queries) + n_memory
    keys_K = jnp.arange(n_memory + n_queries)
    distance_QK = queries_Q[:, None] - keys_K[None, :]
    near_QK = (distance_QK >= 0) & (distance_QK < span)
    valid_BK = keys_K[None, :] >= n_memory - length_B[:, None]
    return near_QK[None] & valid_BK[:, None, :]


def mask_to_bias(mask_BQK, dtype=jnp.float32):
    """What to add to scores (H, B, Q, K): 0 where the mask is True, else about minus infinity; (1, B, Q, K)."""
    return jnp.where(mask_BQK, jnp.asarray(0, dtype), jnp.asarray(NEVER, dtype))[None]


def relative_attention(content_HBQE, position_HBQE, k_HBKE, v_HBKE, r_HRE, bias_1BQK, *, probability_mask=None, dtype=None):
    """Softmax attention whose score is content . key + position . (relative key of the distance).

    Args:
      content_HBQE: queries plus the content bias, already divided by sqrt(E).
      position_HBQE: queries plus the position bias, already divided by sqrt(E).
      k_HBKE, v_HBKE: keys and values.
      r_HRE: relative keys, R = 1 + K: a filler row, then distances K - 1 down to 0 (see `relative_shift`).
      bias_1BQK: added to the scores, from `mask_to_bias`.
      probability_mask: (H, B, Q, K) multiplies the probabilities, or None.
      dtype: compute type of the contractions, None for that of the arguments. The softmax is float32 or wider.

    Returns: (B, Q, H, E).
    """
    by_content = contract("hbqe,hbke->hbqk", content_HBQE, k_HBKE, dtype)
    by_distance = contract("hbqe,hre->hbqr", position_HBQE, r_HRE, dtype)
    scores_HBQK = by_content + relative_shift(by_distance) + bias_1BQK
    # The division by the sum comes after the values: Q x E of them instead of Q x K.
    weights_HBQK = jnp.exp(scores_HBQK - lax.stop_gradient(scores_HBQK.max(-1, keepdims=True)))
    total_HBQ1 = weights_HBQK.sum(-1, keepdims=True)
    seen_HBQE = contract("hbqk,hbke->hbqe", apply_mask(weights_HBQK, probability_mask), v_HBKE, dtype) / total_HBQ1
    return seen_HBQE.transpose(1, 2, 0, 3)
