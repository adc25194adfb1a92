"""Models by name. A new one derives from `LanguageModel`, `ImageModel` or `PuzzleModel`, and has a line in this table."""

from flax import nnx

from deq_flax.errors import UserError
from deq_flax.models.attention_reasoner import AttentionReasoner
from deq_flax.models.conv_reasoner import ConvReasoner
from deq_flax.models.deq_transformer import DEQTransformer
from deq_flax.models.mdeq import MDEQ
from deq_flax.models.model import Model, ModelOptions
from deq_flax.models.proposal_deq import ProposalDEQ
from deq_flax.models.transformer_xl import TransformerXL
from deq_flax.models.two_level_reasoner import TwoLevelReasoner

MODELS: dict[str, type[Model]] = {
    "deq_transformer": DEQTransformer,
    "transformer_xl": TransformerXL,
    "proposal_deq": ProposalDEQ,
    "mdeq": MDEQ,
    "conv_reasoner": ConvReasoner,
    "attention_reasoner": AttentionReasoner,
    "two_level_reasoner": TwoLevelReasoner,
}
"""The models that `model.name` in a config may name."""


def build_model(options: ModelOptions, *, rngs: nnx.Rngs) -> Model:
    """The freshly initialized model that `options.name` names.

    Raises:
      UserError: there is no such model.
      ValueError: an option is out of range.
    """
    if options.name not in MODELS:
        raise UserError(f"unknown model.name {options.name!r}; known: {', '.join(MODELS)}")
    return MODELS[options.name](options, rngs=rngs)


def abstract_model(options: ModelOptions) -> Model:
    """The model of `build_model` with shapes and types in place of arrays: no memory is allocated.

    Raises:
      UserError: there is no such model, or an option is out of range.
    """
    try:
        return nnx.eval_shape(lambda: build_model(options, rngs=nnx.Rngs(0)))
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"section model: {error}") from error
