"""A language model that refines a proposal: explicit blocks compute c, and an equilibrium that starts there improves on it.

The attractor model of Fein-Ashley and Rashidinejad (2026, arXiv:2605.12466): z* = f(z*, c) with f(z, c) = c + s u(z + c), where
u(y) is what a few Transformer blocks add to their input y and s is a learned scale of each feature. c is both the initial guess
and an input of every evaluation. With s = 0 the model is its explicit part, so a small s lets training begin near a plain
Transformer, with a solve that converges at once.

B batch, L length, D model features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.models.deq_transformer import EquilibriumTransformer
from deq_flax.models.language_model import TransformerOptions
from deq_flax.models.layers import LayerMemory, RemembersInputs, layer_contexts, next_layer_memory, run_layers
from deq_flax.nn.transformer import TransformerCell


@dataclass(frozen=True, kw_only=True)
class ProposalOptions(TransformerOptions):
    """Options of a `ProposalDEQ`.

    Raises:
      ValueError: a value is out of range.
    """

    name: str = "proposal_deq"
    proposal_blocks: int = 2
    """Explicit Transformer blocks before the equilibrium; 0: the proposal is the embedding."""
    update_scale: float = 1.0
    """Initial value of the learned scale, one number for each feature, of what f adds to the proposal."""
    inject_proposal: bool = True
    """Add the proposal to the input of every evaluation of f; if not, it is only the initial guess, and f(z) = z + s u(z)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proposal_blocks < 0:
            raise ValueError(f"proposal_blocks must not be negative, got {self.proposal_blocks}")


class Equation(NamedTuple):
    """The equation z = f(z) of one segment."""

    f: Callable[[jax.Array], jax.Array]
    """(B, L, D) -> (B, L, D)."""
    z0_BLD: jax.Array
    """The proposal c."""
    inputs: Callable[[jax.Array], list[jax.Array]]
    """The input (B, L, D) of every layer, given the equilibrium: what the memory holds."""


class ProposalDEQ(RemembersInputs, EquilibriumTransformer):
    """Adaptive embedding, explicit Transformer blocks, the equilibrium of a few more, and adaptive softmax.

    The layers are those of a `TransformerXL`, each with a memory of its own inputs; the last `blocks` of them are in f. Their
    memory holds the inputs that they have at the equilibrium, so that cutting a text into segments changes nothing.

    Raises:
      ValueError: an option is out of range.
    """

    Options = ProposalOptions

    def __init__(self, options: ProposalOptions, *, rngs: nnx.Rngs):
        super().__init__(options, rngs=rngs)
        layers = options.proposal_blocks + options.blocks
        self.explicit, self.inject = options.proposal_blocks, options.inject_proposal
        self.cells = nnx.List([TransformerCell(options, rngs=rngs) for _ in range(layers)])
        self.scale_D = nnx.Param(jnp.full((options.d_model,), options.update_scale, jnp.float32))
        self.tie(rngs)

    def equation(self, tokens_BL: jax.Array, memory: LayerMemory, key: jax.Array | None = None) -> Equation:
        keys = [None] * (len(self.cells) + 1) if key is None else jax.random.split(key, len(self.cells) + 1)
        x_BLD, n = self.embed(tokens_BL, keys[0]), self.explicit
        contexts = layer_contexts(self.cells, x_BLD, memory, keys[1:])
        c_BLD, proposal_inputs = run_layers(self.cells[:n], x_BLD, contexts[:n])
        offset_BLD = c_BLD if self.inject else jnp.zeros_like(c_BLD)
        scale_11D = self.scale_D[...][None, None]

        def refine(z_BLD: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            """The update that the blocks of f add to their input, and the input of each block."""
            y_BLD = z_BLD + offset_BLD
            out_BLD, inputs = run_layers(self.cells[n:], y_BLD, contexts[n:])
            return out_BLD - y_BLD, inputs

        def f(z_BLD: jax.Array) -> jax.Array:
            return (c_BLD if self.inject else z_BLD) + scale_11D * refine(z_BLD)[0]

        return Equation(f, c_BLD, lambda z_BLD: [*proposal_inputs, *refine(z_BLD)[1]])

    def next_memory(
        self, memory: LayerMemory, equation: Equation, z_BLD: jax.Array, count: jax.Array | None = None
    ) -> LayerMemory:
        return next_layer_memory(memory, equation.inputs(z_BLD), count)
