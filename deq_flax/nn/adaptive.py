"""Adaptive input embedding and adaptive softmax (Baevski and Auli 2019, arXiv:1809.10853; Grave et al. 2017, arXiv:1609.04309).

The vocabulary, sorted by frequency, is cut into clusters; cluster i has features of size d_embed // div_value^i. With
div_value 1 all clusters share one table.

B batch, L length, T tokens (batch and length together), D model features, E features of a cluster, N words of a cluster,
C tail clusters.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_flax.nn.linear import normal_param, zeros_param
from deq_flax.nn.precision import compute_dtype, contract, wide

TOO_FEW_TO_SKIP = 2**17
"""Logits of a tail cluster that are computed for all tokens rather than for those of the cluster."""


def cluster_bounds(vocab_size, d_embed, cutoffs, div_value):
    """[(first word, end word, features)] of every cluster.

    Raises ValueError for cutoffs that do not increase strictly within (0, vocab_size), or a cluster without features.
    """
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
    """tokens_BL -> (B, L, d_model), times sqrt(d_model).

    `tables_NE`: one table a cluster (one in all when div_value is 1). `projections_ED`: likewise, and none when div_value is 1
    and d_embed equals d_model. All drawn from N(0, 0.01^2).
    """

    def __init__(self, vocab_size, d_embed, d_model, *, cutoffs=(), div_value=1, rngs):
        self.d_model = d_model
        self.bounds = tuple(cluster_bounds(vocab_size, d_embed, cutoffs, div_value))
        shared = div_value == 1
        self.tables = tuple([(0, vocab_size, d_embed)] if shared else self.bounds)
        projected = not (shared and d_embed == d_model)
        self.tables_NE = nnx.List([normal_param(rngs.params(), (end - start, size), 0.01) for start, end, size in self.tables])
        self.projections_ED = nnx.List(
            [normal_param(rngs.params(), (size, d_model), 0.01) for *_, size in self.tables if projected]
        )

    def __call__(self, tokens_BL, dtype=None):
        """(B, L, d_model); `dtype` as in `contract`. A token outside the vocabulary embeds as zero."""
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
    """Negative log-likelihoods under a softmax factored as P(word) = P(cluster) P(word | cluster).

    The head ranges over the words of cluster 0 and, for each tail cluster i of C, column C - i of `clusters_EC`.

    Weights are tied: the tables are the embedding's own Params, and so are the projections of the tail clusters; the head's
    projection is a Param of its own.

    Args:
      embedding: the AdaptiveEmbedding to tie to.
      dtype: 'float32' or 'bfloat16', for the contractions; normalisers are always float32 or wider.
      max_logits: the most logits (tokens times words) held at once; beyond that, tokens are taken in chunks whose logits are
        computed again on the way back. Those of a tail cluster are in smaller chunks, to skip tokens that are not in it.
    """

    def __init__(self, embedding, *, dtype="float32", max_logits=2**25, rngs):
        self.bounds = embedding.bounds
        self.max_logits = max_logits
        self.dtype = compute_dtype(dtype)
        head_size = self.bounds[0][2]
        n_tails = len(self.bounds) - 1
        self.tables_NE = nnx.List(list(embedding.tables_NE))
        self.biases_N = nnx.List([zeros_param((end - start,)) for start, end, _ in embedding.tables])
        if embedding.projections_ED:
            own = normal_param(rngs.params(), (head_size, embedding.d_model), 0.01)
            tied = [_of_cluster(embedding.projections_ED, i) for i in range(1, n_tails + 1)]
            self.projections_ED = nnx.List([own, *tied])
        else:
            self.projections_ED = nnx.List([])
        self.clusters_EC = normal_param(rngs.params(), (head_size, n_tails), 0.01) if n_tails else None
        self.cluster_biases_C = zeros_param((n_tails,)) if n_tails else None

    def nll(self, hidden_BLD, targets_BL):
        """(B, L) -log P(target), in the order of the tokens."""
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

    def log_probabilities(self, hidden_BLD):
        """(B, L, vocab_size) log P(word) of every word: meant for few tokens, as in generation."""
        hidden_TD = hidden_BLD.reshape(-1, hidden_BLD.shape[-1])
        head_TE = self._project(hidden_TD, 0)
        tails_TC = self._tail_logits(head_TE)
        total_T = self._head_log_total(head_TE, tails_TC)
        pieces = [_logits(head_TE, *self._words(0), self.dtype) - total_T[:, None]]
        for i in range(1, len(self.bounds)):
            logits_TN = _logits(self._project(hidden_TD, i), *self._words(i), self.dtype)
            pieces.append(jax.nn.log_softmax(logits_TN, axis=-1) + (tails_TC[:, -i] - total_T)[:, None])
        return jnp.concatenate(pieces, axis=-1).reshape(*hidden_BLD.shape[:-1], -1)

    def _project(self, hidden_TD, i):
        """Hidden states in the features of cluster i, (T, E)."""
        if not self.projections_ED:
            return hidden_TD
        return contract("td,ed->te", hidden_TD, self.projections_ED[i][...], self.dtype)

    def _words(self, i):
        """Table (N, E) and biases (N,) of the words of cluster i."""
        start, end, _ = self.bounds[i]
        table_NE, bias_N = _of_cluster(self.tables_NE, i)[...], _of_cluster(self.biases_N, i)[...]
        return (table_NE, bias_N) if table_NE.shape[0] == end - start else (table_NE[start:end], bias_N[start:end])

    def _tail_logits(self, head_TE):
        """(T, C) logits of the tail clusters within the head, or None."""
        if self.clusters_EC is None or self.cluster_biases_C is None:
            return None
        return contract("te,ec->tc", head_TE, self.clusters_EC[...], self.dtype) + self.cluster_biases_C[...][None, :]

    def _head_log_total(self, head_TE, tails_TC):
        words_T = self._log_total(head_TE, 0)
        return words_T if tails_TC is None else jnp.logaddexp(words_T, _logsumexp(tails_TC))

    def _word_logits(self, x_TE, targets_T, i):
        """(T,) the logit of each target within cluster i; meaningless for targets of other clusters."""
        table_NE, bias_N = self._words(i)
        words_T = targets_T - self.bounds[i][0]
        return contract("te,te->t", x_TE, _rows(table_NE, words_T), self.dtype) + _rows(bias_N, words_T)

    def _log_total(self, x_TE, i, wanted_T=None):
        """(T,) log sum exp of the logits of cluster i; in chunks, those that hold no wanted token are left 0."""
        table_NE, bias_N = self._words(i)
        n_tokens, n_words = x_TE.shape[0], table_NE.shape[0]
        most = self.max_logits
        if wanted_T is not None:  # few tokens are: an eighth at a time, most of which are skipped
            most = min(most, max(n_tokens * n_words // 8, TOO_FEW_TO_SKIP))
        if n_tokens * n_words <= most:
            return _logsumexp(_logits(x_TE, table_NE, bias_N, self.dtype))
        total = jax.checkpoint(lambda x_RE: _logsumexp(_logits(x_RE, table_NE, bias_N, self.dtype)))
        rows = max(1, most // n_words)
        if wanted_T is None:
            return _in_chunks(total, x_TE, rows, n_tokens)
        order_T = jnp.argsort(~wanted_T, stable=True)
        sorted_T = _in_chunks(total, x_TE[order_T], rows, wanted_T.sum())
        return sorted_T[jnp.argsort(order_T)]


def _in_chunks(function, x_TE, rows, count):
    """`function` ((R, E) -> (R,)) over chunks of `rows` rows of x_TE, skipping those that begin at or after row `count`."""
    n_chunks = -(-x_TE.shape[0] // rows)
    padded = jnp.pad(x_TE, ((0, n_chunks * rows - x_TE.shape[0]), (0, 0)))
    chunks = padded.reshape(n_chunks, rows, -1)
    out = jax.eval_shape(function, chunks[0])

    def one(_, chunk):
        start, x_RE = chunk
        return None, lax.cond(start < count, function, lambda _: jnp.zeros(out.shape, out.dtype), x_RE)

    _, totals = lax.scan(one, None, (jnp.arange(n_chunks) * rows, chunks))
    return totals.reshape(-1)[: x_TE.shape[0]]


def _logits(x_TE, table_NE, bias_N, dtype):
    return contract("te,ne->tn", x_TE, table_NE, dtype) + bias_N[None, :]


def _logsumexp(logits):
    """Over the last axis; half the time of `jax.nn.logsumexp` with its gradient, for want of care for infinities."""
    logits = wide(logits)
    peak = lax.stop_gradient(logits.max(-1, keepdims=True))
    return jnp.log(jnp.exp(logits - peak).sum(-1)) + peak[..., 0]


def _of_cluster(params, i):
    """The entry of cluster i, which is the only one where clusters share."""
    return params[i] if len(params) > 1 else params[0]


def _rows(table, index):
    return jnp.take(table, index, axis=0, mode="clip")
