"""The DEQ-Transformer language model (Bai et al. 2019, arXiv:1909.01377; Bai et al. 2021, arXiv:2106.14342).

f is one Transformer-XL block, or a few of them; the hidden states are its equilibrium z* = f(z*, tokens, memory).

B batch, L length, M memory, K keys (M + L), D model features, J features of an injection (3 * heads * features of a head).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_flax.equilibrium import fixed_point
from deq_flax.equilibrium.solution import Solve
from deq_flax.models.language_model import TransformerLanguageModel, TransformerOptions
from deq_flax.models.layers import push
from deq_flax.models.model import LanguageOutput
from deq_flax.nn.attention import position_encoding
from deq_flax.nn.linear import Linear
from deq_flax.nn.transformer import Memory, TransformerCell
from deq_flax.nn.transformer_stack import TransformerStack


class EquilibriumTransformer(TransformerLanguageModel):
    """A Transformer language model whose hidden states are an equilibrium; a subclass has the equation and the memory."""

    has_equilibrium = True

    def equation(self, tokens_BL: jax.Array, memory: Any, key: jax.Array | None = None) -> Any:
        """The equation of a segment: f and z0_BLD, and what `next_memory` needs.

        Given a key, with dropout masks that are the same in every evaluation of f.
        """
        raise NotImplementedError

    def next_memory(self, memory: Any, equation: Any, z_BLD: jax.Array, count: jax.Array | None = None) -> Any:
        """The memory, without gradient, after the first `count` tokens of each segment, (B,), or all; z is the equilibrium."""
        raise NotImplementedError

    def __call__(
        self, tokens_BL: jax.Array, memory: Any, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> LanguageOutput:
        equation_key, output_key = (None, None) if key is None else jax.random.split(key)
        equation = self.equation(tokens_BL, memory, equation_key)
        f, z0_BLD = equation.f, equation.z0_BLD
        solution, jacobian_loss = (fixed_point(f, z0_BLD), None) if solve is None else solve(f, z0_BLD)
        return LanguageOutput(
            hidden_BLD=self.drop_output(solution.value, output_key),
            memory=self.next_memory(memory, equation, solution.value),
            stats=solution.stats,
            jacobian_loss=jacobian_loss,
        )


class Equation(NamedTuple):
    """The equation z = f(z) of one segment."""

    f: Callable[[jax.Array], jax.Array]
    """(B, L, D) -> (B, L, D)."""
    z0_BLD: jax.Array
    """Zeros."""
    injection_BLJ: jax.Array


class DEQTransformer(EquilibriumTransformer):
    """Adaptive embedding, the equilibrium of a `TransformerCell` or `TransformerStack`, and adaptive softmax.

    Raises:
      ValueError: an option is out of range.
    """

    def __init__(self, options: TransformerOptions, *, rngs: nnx.Rngs):
        super().__init__(options, rngs=rngs)
        self.injection = Linear(options.d_model, 3 * options.n_head * options.d_head, rngs=rngs)
        self.cell: TransformerCell | TransformerStack
        if options.blocks == 1:
            self.cell = TransformerCell(options, rngs=rngs)
        else:
            self.cell = TransformerStack(options, blocks=options.blocks, rngs=rngs)
        self.tie(rngs)

    def fresh_memory(self, batch_size: int) -> Memory:
        (d_model, width), dtype = self.injection.weight_IO.shape, self.injection.weight_IO.dtype
        return Memory(
            states_BMD=jnp.zeros((batch_size, self.options.mem_len, d_model), dtype),
            injections_BMJ=jnp.zeros((batch_size, self.options.mem_len, width), dtype),
            length_B=jnp.zeros((batch_size,), jnp.int32),
        )

    def equation(self, tokens_BL: jax.Array, memory: Memory, key: jax.Array | None = None) -> Equation:
        embed_key, cell_key = (None, None) if key is None else jax.random.split(key)
        injection_BLJ = self.injection(self.embed(tokens_BL, embed_key), self.dtype)
        (batch_size, length), n_memory = tokens_BL.shape, memory.states_BMD.shape[1]
        masks: Any = self.cell.draw_masks(cell_key, batch_size, length, n_memory)
        positions_KD = position_encoding(n_memory + length, self.options.d_model, injection_BLJ.dtype)
        context: Any = self.cell.context(injection_BLJ, memory, positions_KD, masks)
        z0_BLD = jnp.zeros((batch_size, length, self.options.d_model), injection_BLJ.dtype)
        return Equation(lambda z_BLD: self.cell.evaluate(z_BLD, context), z0_BLD, injection_BLJ)

    def next_memory(self, memory: Memory, equation: Equation, z_BLD: jax.Array, count: jax.Array | None = None) -> Memory:
        added, size = z_BLD.shape[1] if count is None else count, memory.states_BMD.shape[1]
        following = Memory(
            states_BMD=push(memory.states_BMD, z_BLD, axis=1, count=count),
            injections_BMJ=push(memory.injections_BMJ, equation.injection_BLJ, axis=1, count=count),
            length_B=jnp.minimum(memory.length_B + added, size),
        )
        return lax.stop_gradient(following)
