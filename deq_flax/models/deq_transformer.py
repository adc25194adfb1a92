"""The DEQ-Transformer language model (Bai et al. 2019, arXiv:1909.01377; Bai et al. 2021, arXiv:2106.14342).

One Transformer-XL block f, or a few of them, and hidden states z* = f(z*, tokens, memory).

B batch, L length, M memory, K keys (M + L), D model features, J features of an injection (3 * heads * features of a head).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_flax.models.solve import solve
from deq_flax.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from deq_flax.nn.attention import position_encoding
from deq_flax.nn.dropout import apply_mask, draw_mask
from deq_flax.nn.linear import Linear
from deq_flax.nn.precision import compute_dtype
from deq_flax.nn.transformer import Memory, TransformerCell, TransformerStack

OUTPUT_DROPOUT = {"tokens": (True, True, False), "features": (True, False, True), "none": None}
"""Which axes of the hidden states (B, L, D) have entries of their own in the output dropout mask."""


class Equation(NamedTuple):
    """z = f(z) of one segment."""

    f: Callable[[jax.Array], jax.Array]
    """(B, L, D) -> (B, L, D)."""
    z0_BLD: jax.Array
    """Zeros."""
    injection_BLJ: jax.Array


class Output(NamedTuple):
    """What the model makes of one segment."""

    hidden_BLD: jax.Array
    memory: Memory
    stats: Any
    """`SolverStats` of the forward solve."""
    jacobian_loss: jax.Array | None


class DEQTransformer(nnx.Module):
    """Adaptive embedding, the equilibrium of a `TransformerCell`, and adaptive softmax with tied weights.

    Args:
      cutoffs, div_value: see `nn.adaptive`; () is one softmax over the vocabulary.
      blocks: Transformer blocks in f.
      pre_norm, affine_norm, weight_norm: see `nn.transformer.TransformerCell`.
      mem_len: positions of memory carried from segment to segment; may be 0.
      local_size: attention span in tokens; 0 stands for 1000.
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
        n_head,
        d_head,
        d_inner,
        blocks=1,
        cutoffs=(),
        div_value=1,
        pre_norm=False,
        affine_norm=False,
        weight_norm=True,
        mem_len=0,
        local_size=0,
        dropout=0.0,
        attention_dropout=0.0,
        output_dropout="tokens",
        dtype="float32",
        rngs,
    ):
        if output_dropout not in OUTPUT_DROPOUT:
            raise ValueError(f"unknown output_dropout {output_dropout!r}; known: {', '.join(sorted(OUTPUT_DROPOUT))}")
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        if d_model % 2:
            raise ValueError(f"d_model must be even for sinusoidal positions, got {d_model}")
        if mem_len < 0 or local_size < 0:
            raise ValueError(f"mem_len and local_size must not be negative, got {mem_len} and {local_size}")
        self.d_model, self.mem_len, self.injection_width = d_model, mem_len, 3 * n_head * d_head
        self.dropout, self.output_dropout, self.dtype = dropout, output_dropout, compute_dtype(dtype)
        self.embedding = AdaptiveEmbedding(vocab_size, d_embed, d_model, cutoffs=cutoffs, div_value=div_value, rngs=rngs)
        self.injection = Linear(d_model, self.injection_width, rngs=rngs)
        cell = TransformerCell if blocks == 1 else partial(TransformerStack, blocks=blocks)
        self.cell = cell(
            d_model,
            n_head=n_head,
            d_head=d_head,
            d_inner=d_inner,
            pre_norm=pre_norm,
            affine_norm=affine_norm,
            weight_norm=weight_norm,
            local_size=local_size,
            dropout=dropout,
            attention_dropout=attention_dropout,
            dtype=dtype,
            rngs=rngs,
        )
        self.softmax = AdaptiveSoftmax(self.embedding, dtype=dtype, rngs=rngs)

    def fresh_memory(self, batch_size):
        """Memory at the start of a stream: nothing valid."""
        dtype = self.injection.weight_IO.dtype
        return Memory(
            states_BMD=jnp.zeros((batch_size, self.mem_len, self.d_model), dtype),
            injections_BMJ=jnp.zeros((batch_size, self.mem_len, self.injection_width), dtype),
            length_B=jnp.zeros((batch_size,), jnp.int32),
        )

    def embed(self, tokens_BL, key=None):
        """(B, L, D) embeddings; with a key, the same features are dropped at all positions."""
        x_BLD = self.embedding(tokens_BL, self.dtype)
        return apply_mask(x_BLD, draw_mask(key, self.dropout, (x_BLD.shape[0], 1, self.d_model), x_BLD.dtype))

    def equation(self, tokens_BL, memory, key=None):
        """The equation z = f(z) of a segment, with dropout masks drawn from `key`, if any, once and for all."""
        embed_key, cell_key = (None, None) if key is None else jax.random.split(key)
        injection_BLJ = self.injection(self.embed(tokens_BL, embed_key), self.dtype)
        (batch_size, length), n_memory = tokens_BL.shape, memory.states_BMD.shape[1]
        masks = self.cell.draw_masks(cell_key, batch_size, length, n_memory)
        positions_KD = position_encoding(n_memory + length, self.d_model, injection_BLJ.dtype)
        context = self.cell.context(injection_BLJ, memory, positions_KD, masks)
        z0_BLD = jnp.zeros((batch_size, length, self.d_model), injection_BLJ.dtype)
        return Equation(lambda z_BLD: self.cell.evaluate(z_BLD, context), z0_BLD, injection_BLJ)

    def __call__(
        self,
        tokens_BL,
        memory,
        *,
        solver=None,
        gradient=None,
        key=None,
        max_steps=None,
        probe=None,
        jacobian_key=None,
        jacobian_through_equilibrium=False,
    ):
        """Hidden states of one segment, to be handed to `nll`, and the memory for the next.

        Args:
          tokens_BL: int token ids.
          memory: from `fresh_memory` or from the segment before.
          solver, gradient, max_steps, probe: as of `fixed_point`.
          key: draws the dropout masks; nothing is random without it.
          jacobian_key, jacobian_through_equilibrium: as of `models.solve.solve`.
        """
        equation_key, output_key = (None, None) if key is None else jax.random.split(key)
        f, z0_BLD, injection_BLJ = self.equation(tokens_BL, memory, equation_key)
        solution, jacobian_loss = solve(
            f,
            z0_BLD,
            solver=solver,
            gradient=gradient,
            max_steps=max_steps,
            probe=probe,
            jacobian_key=jacobian_key,
            jacobian_through_equilibrium=jacobian_through_equilibrium,
        )
        z_BLD = solution.value
        return Output(
            hidden_BLD=apply_mask(z_BLD, self._output_mask(output_key, z_BLD)),
            memory=self.next_memory(memory, z_BLD, injection_BLJ),
            stats=solution.stats,
            jacobian_loss=jacobian_loss,
        )

    def nll(self, hidden_BLD, targets_BL):
        """(B, L) negative log-likelihood of each target, in nats."""
        return self.softmax.nll(hidden_BLD, targets_BL)

    def log_probabilities(self, hidden_BLD):
        """(B, L, vocab_size) log-probability of every next word: for few tokens, as in generation."""
        return self.softmax.log_probabilities(hidden_BLD)

    def next_memory(self, memory, z_BLD, injection_BLJ):
        """The last `mem_len` of old and new entries, cut off from the gradient."""
        length = z_BLD.shape[1]
        states = jnp.concatenate([memory.states_BMD, z_BLD], axis=1)[:, length:]
        injections = jnp.concatenate([memory.injections_BMJ, injection_BLJ], axis=1)[:, length:]
        valid_B = jnp.minimum(memory.length_B + length, memory.states_BMD.shape[1])
        return lax.stop_gradient(Memory(states, injections, valid_B))

    def _output_mask(self, key, z_BLD):
        own = OUTPUT_DROPOUT[self.output_dropout]
        if own is None:
            return None
        shape = tuple(size if has else 1 for size, has in zip(z_BLD.shape, own, strict=True))
        return draw_mask(key, self.dropout, shape, z_BLD.dtype)
