"""Laws of relative attention. B batch, H heads, Q queries, K keys, E features, R relative keys (1 + K)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax.nn.attention import (
    attention_mask,
    inverse_frequencies,
    mask_to_bias,
    position_encoding,
    relative_attention,
    relative_shift,
)


def test_relative_shift_puts_each_distance_at_its_key():
    n_memory, n_queries = 3, 4
    n_keys = n_memory + n_queries
    by_distance = jnp.broadcast_to(jnp.arange(n_keys, -1, -1)[None, :], (n_queries, n_keys + 1))  # entry 1 + j: K - 1 - j
    shifted = np.asarray(relative_shift(by_distance))
    for i in range(n_queries):
        for j in range(n_memory + i + 1):
            assert shifted[i, j] == n_memory + i - j


@pytest.mark.parametrize("local_size", [0, 3])
def test_mask_allows_the_past_within_the_span_and_valid_memory(local_size):
    n_queries, n_memory, lengths = 4, 5, [0, 2, 5]
    mask = np.asarray(attention_mask(n_queries, n_memory, jnp.array(lengths), local_size))
    for b, length in enumerate(lengths):
        for i in range(n_queries):
            for j in range(n_memory + n_queries):
                distance = n_memory + i - j
                assert mask[b, i, j] == (0 <= distance < (local_size or 1000) and j >= n_memory - length)


def test_attention_is_softmax_of_content_and_position_scores():
    n_queries, n_memory = 3, 2
    n_keys, random = n_memory + n_queries, np.random.default_rng(0)
    content, position = random.normal(size=(2, 2, 2, n_queries, 4)).astype(np.float32)
    k, v = random.normal(size=(2, 2, 2, n_keys, 4)).astype(np.float32)
    r = random.normal(size=(2, 1 + n_keys, 4)).astype(np.float32)
    mask = np.asarray(attention_mask(n_queries, n_memory, jnp.array([2, 1])))
    out = np.asarray(jax.jit(relative_attention)(content, position, k, v, r, mask_to_bias(mask)))
    for b, h, i in np.ndindex(2, 2, n_queries):
        seen = [j for j in range(n_keys) if mask[b, i, j]]
        scores = [content[h, b, i] @ k[h, b, j] + position[h, b, i] @ r[h, -1 - (n_memory + i - j)] for j in seen]
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(out[b, i, h], weights @ v[h, b, seen], rtol=1e-5, atol=1e-6)


def test_position_encoding_depends_on_the_distance_alone():
    np.testing.assert_array_equal(position_encoding(5, 8), position_encoding(9, 8)[4:])
    np.testing.assert_array_equal(position_encoding(1, 8)[0], [0, 0, 0, 0, 1, 1, 1, 1])


def test_odd_features_are_refused():
    with pytest.raises(ValueError, match="even"):
        inverse_frequencies(7)
