"""The Transformer-XL language model (Dai et al. 2019, arXiv:1901.02860): the explicit counterpart of the DEQ-Transformer.

Blocks, embedding, softmax and dropout masks are those of the DEQ-Transformer, but there are several blocks, each with its own
weights and memory, and nothing is injected into them.

B batch, L length, D model features.
"""

import jax
from flax import nnx

from deq_flax.equilibrium.solution import Solve
from deq_flax.models.language_model import TransformerLanguageModel, TransformerOptions
from deq_flax.models.layers import LayerMemory, RemembersInputs, layer_contexts, next_layer_memory, run_layers
from deq_flax.models.model import LanguageOutput
from deq_flax.nn.transformer import TransformerCell


class TransformerXL(RemembersInputs, TransformerLanguageModel):
    """Adaptive embedding, Transformer blocks in sequence, and adaptive softmax.

    Raises:
      ValueError: an option is out of range.
    """

    has_equilibrium = False

    def __init__(self, options: TransformerOptions, *, rngs: nnx.Rngs):
        super().__init__(options, rngs=rngs)
        self.cells = nnx.List([TransformerCell(options, rngs=rngs) for _ in range(options.blocks)])
        self.tie(rngs)

    def __call__(
        self, tokens_BL: jax.Array, memory: LayerMemory, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> LanguageOutput:
        keys = [None] * (len(self.cells) + 2) if key is None else jax.random.split(key, len(self.cells) + 2)
        x_BLD = self.embed(tokens_BL, keys[0])
        contexts = layer_contexts(self.cells, x_BLD, memory, keys[1:-1])
        x_BLD, inputs = run_layers(self.cells, x_BLD, contexts)
        following = next_layer_memory(memory, inputs)
        return LanguageOutput(self.drop_output(x_BLD, keys[-1]), following, stats=None, jacobian_loss=None)
