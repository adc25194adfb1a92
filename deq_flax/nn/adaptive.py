"""Adaptive input embedding and adaptive softmax (Baevski and Auli 2019, arXiv:1809.10853; Grave et al. 2017, arXiv:1609.04309).

The vocabulary, sorted by frequency, is cut into clusters. Cluster i, from 0, has d_embed // div_value^i features. With
div_value 1, all clusters share one table.

B batch, L length, T tokens (batch and length together), R tokens of a chunk, D model features, E features of a cluster,
N words of a cluster, C tail clusters.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from deq_flax.nn.linear import normal_param, zeros_param
from deq_flax.nn.precision import compute_dtype, contract, wide

MAX_LOGITS = 2**25
"""Most logits (tokens times words) that the softmax holds at once. Beyond that, tokens are taken in chunks, whose logits are
recomputed in the backward pass. The chunks of a tail cluster are smaller, so that most of them hold no token of it and are
skipped."""

MIN_TAIL_LOGITS = 2**17
"""Number of logits up to which a tail cluster is computed for all tokens rather than only for those in it."""

Bounds = tuple[int, int, int]
"""(first word, end word, features) of a cluster."""


def cluster_bounds(vocab_size: int, d_embed: int, cutoffs: Sequence[int], div_value: int) -> list[Bounds]:
    """The bounds of each cluster.

    Raises:
      ValueError: the vocabulary is empty, the cutoffs do not increase strictly within (0, vocab_size), or a cluster would have
        no features.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    edges = [0, *cutoffs, vocab_size]
    if any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"cutoffs must increase strictly within (0, {vocab_size}), got {tuple(cutoffs)}")
    if div_value < 1:
        raise ValueError(f"div_value must be at least 1, got {div_value}")
    sizes = [d_embed // div_value**i for i in range(len(edges) - 1)]
    if sizes[-1] < 1:
        raise ValueError(
            f"d_embed {d_embed} leaves nothing for cluster {len(sizes) - 1}: it is divided by {div_value} per cluster"
        )
    return list(zip(edges[:-1], edges[1:], sizes, strict=True))


class AdaptiveEmbedding(nnx.Module):
    """Embed tokens (B, L) as (B, L, d_model), multiplied by sqrt(d_model).

    `tables_NE` holds one table per cluster, or a single one if div_value is 1. `projections_ED` holds as many, or none if
    div_value is 1 and d_embed equals d_model. All start as N(0, 0.01^2).

    Args:
      cutoffs: first word of each cluster but the first; (): one cluster.
      div_value: ratio of the features of successive clusters.

    Raises:
      ValueError: see `cluster_bounds`.
    """

    def __init__(
        self,
        vocab_size: int,
        d_embed: int,
        d_model: int,
        *,
        cutoffs: Sequence[int] = (),
        div_value: int = 1,
        rngs: nnx.Rngs,
    ):
        self.d_model = d_model
        self.bounds = tuple(cluster_bounds(vocab_size, d_embed, cutoffs, div_value))
        shared = div_value == 1
        self.tables = ((0, vocab_size, d_embed),) if shared else self.bounds
        projected = not (shared and d_embed == d_model)
        self.tables_NE = nnx.List([normal_param(rngs.params(), (end - start, size), 0.01) for start, end, size in self.tables])
        self.projections_ED = nnx.List(
            [normal_param(rngs.params(), (size, d_model), 0.01) for *_, size in self.tables if projected]
        )

    def __call__(self, tokens_BL: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """(B, L) -> (B, L, d_model); `dtype` as in `contract`. A token outside the vocabulary embeds as zero."""
        pieces = []
        for (start, end, _), table_NE in zip(self.tables, self.tables_NE, strict=True):
            inside_BL = (tokens_BL >= start) & (tokens_BL < end)
            rows_BLE = _rows(table_NE[...], tokens_BL - start)
            pieces.append(rows_BLE * inside_BL[..., None].astype(rows_BLE.dtype))
        x_BLE = jnp.concatenate(pieces, axis=-1)
        if self.projections_ED:
            x_BLE = contract("ble,ed->bld", x_BLE, jnp.concatenate([p[...] for p in self.projections_ED]), dtype)
        return x_BLE * self.d_model**0.5


class AdaptiveSoftmax(nnx.Module):
    """Negative log-likelihoods under a softmax that factors as P(word) = P(cluster) P(word | cluster).

    The head ranges over the words of cluster 0 and the C tail clusters; tail cluster i is column C - i of `clusters_EC`.

    Weights are tied: the tables, and the projections of the tail clusters, are the embedding's own Params. The head has a
    projection of its own.

    Args:
      embedding: the AdaptiveEmbedding to tie to.
      dtype: 'float32' or 'bfloat16', for the contractions; normalizers are always float32 or wider.
    """

    def __init__(self, embedding: AdaptiveEmbedding, *, dtype: str = "float32", rngs: nnx.Rngs):
        self.bounds = embedding.bounds
        self.dtype = compute_dtype(dtype)
        head_size = self.bounds[0][2]
        n_tails = len(self.bounds) - 1
        self.tables_NE = nnx.List(list(embedding.tables_NE))
        self.biases_N = nnx.List([zeros_param((end - start,)) for start, end, _ in embedding.tables])
        projections: list[nnx.Param[jax.Array]] = []
        if embedding.projections_ED:
            own = normal_param(rngs.params(), (head_size, embedding.d_model), 0.01)
            projections = [own, *(_of_cluster(embedding.projections_ED, i) for i in range(1, n_tails + 1))]
        self.projections_ED = nnx.List(projections)
        self.clusters_EC = normal_param(rngs.params(), (head_size, n_tails), 0.01) if n_tails else None
        self.cluster_biases_C = zeros_param((n_tails,)) if n_tails else None

    def nll(self, hidden_BLD: jax.Array, targets_BL: jax.Array) -> jax.Array:
        """-log P(target) in nats, (B, L)."""
        hidden_TD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
        targets_T = targets_BL.reshape(-1)
        starts = jnp.array([start for start, *_ in self.bounds[1:]], targets_T.dtype)
        cluster_T = (targets_T[:, None] >= starts[None, :]).sum(-1)
        head_TE = self._project(hidden_TD, 0)
        tails_TC = self._tail_logits(head_TE)
        head_log_total_T = self._head_log_total(head_TE, tails_TC)
        nll_T = head_log_total_T - jnp.where(cluster_T == 0, self._word_logits(head_TE, targets_T, 0), 0)
        for i in range(1, len(self.bounds)):
            tail_TE = self._project(hidden_TD, i)
            is_tail_T = cluster_T == i
            within_T = self._log_total(tail_TE, i, is_tail_T) - self._word_logits(tail_TE, targets_T, i)
            nll_T += jnp.where(is_tail_T, within_T - tails_TC[:, -i], 0)
        return nll_T.reshape(targets_BL.shape)

    def log_probabilities(self, hidden_BLD: jax.Array) -> jax.Array:
        """log P(word) of every word, (B, L, vocab_size): meant for few tokens, as in generation."""
        hidden_TD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
        head_TE = self._project(hidden_TD, 0)
        tails_TC = self._tail_logits(head_TE)
        total_T = self._head_log_total(head_TE, tails_TC)
        pieces = [_logits(head_TE, *self._words(0), self.dtype) - total_T[:, None]]
        for i in range(1, len(self.bounds)):
            logits_TN = _logits(self._project(hidden_TD, i), *self._words(i), self.dtype)
            pieces.append(jax.nn.log_softmax(logits_TN, axis=-1) + (tails_TC[:, -i] - total_T)[:, None])
        return jnp.concatenate(pieces, axis=-1).reshape(*hidden_BLD.shape[:-1], -1)

    def _project(self, hidden_TD: jax.Array, i: int) -> jax.Array:
        """The hidden states in the features of cluster i, (T, E)."""
        if not self.projections_ED:
            return hidden_TD
        return contract("td,ed->te", hidden_TD, self.projections_ED[i][...], self.dtype)

    def _words(self, i: int) -> tuple[jax.Array, jax.Array]:
        """The table (N, E) and biases (N,) of the words of cluster i."""
        start, end, _ = self.bounds[i]
        table_NE, bias_N = _of_cluster(self.tables_NE, i)[...], _of_cluster(self.biases_N, i)[...]
        return (table_NE, bias_N) if table_NE.shape[0] == end - start else (table_NE[start:end], bias_N[start:end])

    def _tail_logits(self, head_TE: jax.Array) -> jax.Array:
        """The logits of the tail clusters within the head, (T, C); C may be 0."""
        if self.clusters_EC is None or self.cluster_biases_C is None:
            return jnp.zeros((head_TE.shape[0], 0), head_TE.dtype)
        return contract("te,ec->tc", head_TE, self.clusters_EC[...], self.dtype) + self.cluster_biases_C[...][None, :]

    def _head_log_total(self, head_TE: jax.Array, tails_TC: jax.Array) -> jax.Array:
        """The log-normalizer of the head, (T,): over the words of cluster 0 and the tail clusters."""
        words_T = self._log_total(head_TE, 0)
        return jnp.logaddexp(words_T, _logsumexp(tails_TC)) if tails_TC.shape[1] else words_T

    def _word_logits(self, x_TE: jax.Array, targets_T: jax.Array, i: int) -> jax.Array:
        """The logit of each target within cluster i, (T,); meaningless for targets of other clusters."""
        table_NE, bias_N = self._words(i)
        words_T = targets_T - self.bounds[i][0]
        return contract("te,te->t", x_TE, _rows(table_NE, words_T), self.dtype) + _rows(bias_N, words_T)

    def _log_total(self, x_TE: jax.Array, i: int, wanted_T: jax.Array | None = None) -> jax.Array:
        """The log-normalizer of cluster i, (T,).

        `wanted_T`: the tokens for which it is needed, None for all; chunks without any are skipped and left 0.
        """
        table_NE, bias_N = self._words(i)
        n_tokens, n_words = x_TE.shape[0], table_NE.shape[0]
        limit = MAX_LOGITS
        if wanted_T is not None:  # usually few tokens: of chunks of an eighth, most hold none
            limit = min(limit, max(n_tokens * n_words // 8, MIN_TAIL_LOGITS))
        if n_tokens * n_words <= limit:
            return _logsumexp(_logits(x_TE, table_NE, bias_N, self.dtype))
        total = lambda x_RE: _logsumexp(_logits(x_RE, table_NE, bias_N, self.dtype))  # noqa: E731
        rows = max(1, limit // n_words)
        if wanted_T is None:
            return _in_chunks(total, x_TE, rows, n_tokens)
        order_T = jnp.argsort(~wanted_T, stable=True)
        sorted_TE, count = x_TE[order_T], wanted_T.sum()

        def first_chunk(x_TE: jax.Array) -> jax.Array:
            return jnp.pad(total(x_TE[:rows]), (0, n_tokens - rows))

        # One chunk usually holds all: alone it needs no sum of the table's gradient over chunks, most of them zero.
        chunks = partial(_in_chunks, total, rows=rows, count=count)
        sorted_T = jax.checkpoint(partial(lax.cond, count <= rows, first_chunk, chunks))(sorted_TE)
        return sorted_T[jnp.argsort(order_T)]


def _in_chunks(function: Callable[[jax.Array], jax.Array], x_TE: jax.Array, rows: int, count: jax.Array | int) -> jax.Array:
    """Apply `function` ((R, E) -> (R,)) to chunks of `rows` rows; those that begin at or after row `count` are skipped.

    The gradient evaluates it again (rematerialization), and the choice too: what a branch of a conditional keeps for its
    gradient, here the table of the words, would be kept once for each chunk.
    """
    n_chunks = -(-x_TE.shape[0] // rows)
    padded = jnp.pad(x_TE, ((0, n_chunks * rows - x_TE.shape[0]), (0, 0)))
    chunks = padded.reshape(n_chunks, rows, -1)
    out = jax.eval_shape(function, chunks[0])

    @jax.checkpoint
    def one(start: jax.Array, x_RE: jax.Array) -> jax.Array:
        return lax.cond(start < count, function, lambda _: jnp.zeros(out.shape, out.dtype), x_RE)

    _, totals = lax.scan(lambda _, chunk: (None, one(*chunk)), None, (jnp.arange(n_chunks) * rows, chunks))
    return totals.reshape(-1)[: x_TE.shape[0]]


def _logits(x_TE: jax.Array, table_NE: jax.Array, bias_N: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return contract("te,ne->tn", x_TE, table_NE, dtype) + bias_N[None, :]


def _logsumexp(logits: jax.Array) -> jax.Array:
    """log sum exp over the last axis; with its gradient, it takes half the time of JAX's, which also handles infinities."""
    logits = wide(logits)
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    return jnp.log(jnp.exp(logits - peak).sum(-1)) + peak[..., 0]


def _of_cluster(params: Sequence[nnx.Param[jax.Array]], i: int) -> nnx.Param[jax.Array]:
    """The entry of cluster i: the only one if the clusters share it."""
    return params[i] if len(params) > 1 else params[0]


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(table, index, axis=0, mode="clip")
