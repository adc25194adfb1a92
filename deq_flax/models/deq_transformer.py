"""The DEQ-Transformer language model (Bai et al. 2019, arXiv:1909.01377; Bai et al. 2021, arXiv:2106.14342).

One Transformer-XL block f, or a few of them, and hidden states z* = f(z*, tokens, memory).

B batch, L length, M memory, K keys (M + L), D model features, J features of an injection (3 * heads * features of a head).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_flax.models.language_model import WordModel
from deq_flax.models.solve import solve
from deq_flax.nn.attention import position_encoding
from deq_flax.nn.linear import Linear
from deq_flax.nn.transformer import Memory, TransformerCell, TransformerStack


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


class DEQTransformer(WordModel):
    """Adaptive embedding, the equilibrium of a `TransformerCell`, and adaptive softmax with tied weights.

    Args:
      n_head, d_head, d_inner, pre_norm, affine_norm, weight_norm, attention_dropout: see `nn.transformer.TransformerCell`.
      blocks: Transformer blocks in f.
      local_size: attention span in tokens; 0 stands for 1000.
      d_model, dropout, dtype, words: see `WordModel`.

    Raises:
      ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        d_model,
        n_head,
        d_head,
        d_inner,
        blocks=1,
        pre_norm=False,
        affine_norm=False,
        weight_norm=True,
        local_size=0,
        dropout=0.0,
        attention_dropout=0.0,
        dtype="float32",
        rngs,
        **words,
    ):
        super().__init__(d_model=d_model, dropout=dropout, dtype=dtype, rngs=rngs, **words)
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self.injection_width = 3 * n_head * d_head
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
        self.tie(dtype, rngs)

    def fresh_memory(self, batch_size):
        """Memory at the start of a stream: nothing valid."""
        dtype = self.injection.weight_IO.dtype
        return Memory(
            states_BMD=jnp.zeros((batch_size, self.mem_len, self.d_model), dtype),
            injections_BMJ=jnp.zeros((batch_size, self.mem_len, self.injection_width), dtype),
            length_B=jnp.zeros((batch_size,), jnp.int32),
        )

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
            hidden_BLD=self.drop_output(z_BLD, output_key),
            memory=self.next_memory(memory, z_BLD, injection_BLJ),
            stats=solution.stats,
            jacobian_loss=jacobian_loss,
        )

    def next_memory(self, memory, z_BLD, injection_BLJ):
        """The last `mem_len` of old and new entries, cut off from the gradient."""
        length = z_BLD.shape[1]
        states = jnp.concatenate([memory.states_BMD, z_BLD], axis=1)[:, length:]
        injections = jnp.concatenate([memory.injections_BMJ, injection_BLJ], axis=1)[:, length:]
        valid_B = jnp.minimum(memory.length_B + length, memory.states_BMD.shape[1])
        return lax.stop_gradient(Memory(states, injections, valid_B))
