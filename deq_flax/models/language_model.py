"""What language models share: embedding and softmax over words, and the dropout of both.

B batch, L length, D model features.
"""

from flax import nnx

from deq_flax.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from deq_flax.nn.dropout import apply_mask, draw_mask
from deq_flax.nn.precision import compute_dtype

OUTPUT_DROPOUT = {"tokens": (True, True, False), "features": (True, False, True), "none": None}
"""Which axes of the hidden states (B, L, D) have entries of their own in the output dropout mask."""


class WordModel(nnx.Module):
    """Adaptive embedding and adaptive softmax with tied weights; what lies between is a subclass's.

    A subclass calls `tie` once it has drawn its own parameters.

    Args:
      cutoffs, div_value: see `nn.adaptive`; () is one softmax over the vocabulary.
      mem_len: positions of memory carried from segment to segment; may be 0.
      dropout: rate of every mask but the attention's.
      output_dropout: 'tokens' zeroes the whole output of some tokens (as the published recipes do), 'features' some features
        of all tokens, 'none' nothing.
      dtype: 'float32', or 'bfloat16' to compute contractions in it; states and parameters stay float32.

    Raises:
      ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        vocab_size,
        d_model,
        d_embed,
        cutoffs=(),
        div_value=1,
        mem_len=0,
        dropout=0.0,
        output_dropout="tokens",
        dtype="float32",
        rngs,
    ):
        if output_dropout not in OUTPUT_DROPOUT:
            raise ValueError(f"unknown output_dropout {output_dropout!r}; known: {', '.join(sorted(OUTPUT_DROPOUT))}")
        if d_model % 2:
            raise ValueError(f"d_model must be even for sinusoidal positions, got {d_model}")
        if mem_len < 0:
            raise ValueError(f"mem_len must not be negative, got {mem_len}")
        self.d_model, self.mem_len = d_model, mem_len
        self.dropout, self.output_dropout, self.dtype = dropout, output_dropout, compute_dtype(dtype)
        self.embedding = AdaptiveEmbedding(vocab_size, d_embed, d_model, cutoffs=cutoffs, div_value=div_value, rngs=rngs)

    def tie(self, dtype, rngs):
        """Make the softmax, with the embedding's weights."""
        self.softmax = AdaptiveSoftmax(self.embedding, dtype=dtype, rngs=rngs)

    def embed(self, tokens_BL, key=None):
        """(B, L, D) embeddings; with a key, the same features are dropped at all positions."""
        x_BLD = self.embedding(tokens_BL, self.dtype)
        return apply_mask(x_BLD, draw_mask(key, self.dropout, (x_BLD.shape[0], 1, self.d_model), x_BLD.dtype))

    def drop_output(self, z_BLD, key):
        """What the softmax sees of the hidden states; all of them without a key."""
        own = OUTPUT_DROPOUT[self.output_dropout]
        if own is None:
            return z_BLD
        shape = tuple(size if has else 1 for size, has in zip(z_BLD.shape, own, strict=True))
        return apply_mask(z_BLD, draw_mask(key, self.dropout, shape, z_BLD.dtype))

    def nll(self, hidden_BLD, targets_BL):
        """(B, L) negative log-likelihood of each target, in nats."""
        return self.softmax.nll(hidden_BLD, targets_BL)

    def log_probabilities(self, hidden_BLD):
        """(B, L, vocab_size) log-probability of every next word: for few tokens, as in generation."""
        return self.softmax.log_probabilities(hidden_BLD)
