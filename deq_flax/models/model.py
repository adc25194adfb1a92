"""The interface of a model: what tasks and commands rely on, for each kind of model. Read this before writing one.

B batch, L length, H height, W width, C channels, D features of a hidden state, V vocabulary, K classes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
from flax import nnx

from deq_flax.equilibrium.solution import Solve, SolverStats


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options that every model has. Those of a model derive from them; they are the section `model` of a config."""

    name: str = ""
    """Model to build: a name in the table `deq_flax.models.MODELS`."""


class LanguageOutput(NamedTuple):
    """Output of a language model for one segment."""

    hidden_BLD: jax.Array
    """Hidden states, the argument of `LanguageModel.nll`."""
    memory: Any
    """The memory for the next segment, without gradient."""
    stats: SolverStats | None
    """Statistics of the forward solve; None for a model without an equilibrium."""
    jacobian_loss: jax.Array | None
    """The scalar that `solve` returned, if any."""


class ImageOutput(NamedTuple):
    """Output of an image model for one batch."""

    logits: jax.Array
    """(B, K), or (B, H, W, K) at the resolution of the images."""
    stats: SolverStats | None
    """Statistics of the forward solve; None for a model without an equilibrium."""
    jacobian_loss: jax.Array | None
    """The scalar that `solve` returned, if any."""
    branches: tuple[jax.Array, ...]
    """The equilibrium, its finest branch first, each (B, H, W, C)."""


class PuzzleOutput(NamedTuple):
    """Output of a model of puzzles for one batch."""

    logits: jax.Array
    """(B, ..., K): K output symbols for every cell of the input."""
    state: Any
    """The state that the logits were read from, without gradient; None without an equilibrium."""
    halt_B: jax.Array | None
    """Logits of the halting head: is the answer right as it stands? None for a model without one."""
    stats: SolverStats | None
    """Statistics of the forward solve; None for a model without an equilibrium."""
    jacobian_loss: jax.Array | None
    """The scalar that `solve` returned, if any."""


class Model(nnx.Module):
    """A model that `MODELS` may hold: a class with the three attributes below and the methods of its kind.

    A model with an equilibrium also has `equation(inputs..., key=None)`, whose result begins with the map f and the initial
    guess z0: the equation z = f(z) that a call solves, with dropout masks drawn from `key`, if any, once and for all.

    The constructor draws parameters from `rngs` and nothing else. Params that may be split over the mesh axis `tensor` carry
    `out_sharding` metadata (see `nn.linear.Linear`).
    """

    Options: ClassVar[type[ModelOptions]]
    """The dataclass of its options."""
    kind: ClassVar[Literal["language", "image", "puzzle"]]
    """Its interface: that of `LanguageModel`, `ImageModel` or `PuzzleModel`."""
    has_equilibrium: ClassVar[bool]
    """True for a model that solves for an equilibrium: it has `equation` and uses the argument `solve`."""

    def __init__(self, options: Any, *, rngs: nnx.Rngs):
        raise NotImplementedError


class LanguageModel(Model):
    """The interface of a model of token sequences, read segment by segment."""

    kind = "language"

    def fresh_memory(self, batch_size: int) -> Any:
        """The memory at the start of a stream: a NamedTuple of arrays with a leading batch axis.

        Its field `length_B` is the number of valid entries: setting it to 0 clears the memory.
        """
        raise NotImplementedError

    def __call__(
        self, tokens_BL: jax.Array, memory: Any, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> LanguageOutput:
        """Run the model on one segment.

        Args:
          tokens_BL: token ids, int.
          memory: from `fresh_memory`, or from the output of the segment before.
          solve: how to solve for the equilibrium; None: `fixed_point` with its defaults. Ignored without an equilibrium.
          key: draws the dropout masks; without it the model is deterministic, as in evaluation.
        """
        raise NotImplementedError

    def nll(self, hidden_BLD: jax.Array, targets_BL: jax.Array) -> jax.Array:
        """The negative log-likelihood of each target in nats, (B, L)."""
        raise NotImplementedError

    def log_probabilities(self, hidden_BLD: jax.Array) -> jax.Array:
        """The log-probability of every word, (B, L, V): meant for few tokens, as in generation."""
        raise NotImplementedError


class ImageModel(Model):
    """The interface of a model of images."""

    kind = "image"

    def __call__(self, images_BHWC: jax.Array, *, solve: Solve | None = None, key: jax.Array | None = None) -> ImageOutput:
        """Run the model on a batch of images.

        Args:
          images_BHWC: normalized, floating.
          solve: how to solve for the equilibrium; None: `fixed_point` with its defaults. Ignored without an equilibrium.
          key: draws the dropout masks, and batch normalization uses the statistics of the batch and updates the running ones.
            Without it, as in evaluation, nothing is dropped and the running statistics are used.
        """
        raise NotImplementedError


class PuzzleModel(Model):
    """The interface of a model of puzzles: a symbol in, a symbol out, for each cell of a sequence or a grid of any size."""

    kind = "puzzle"

    def initial_state(self, inputs: jax.Array, key: jax.Array | None = None) -> Any:
        """The state that work on a batch of puzzles starts from; `key` draws it, where it is random.

        Without a key it is drawn from a fixed one, so that evaluation repeats itself.
        """
        raise NotImplementedError

    def __call__(
        self, inputs: jax.Array, state: Any = None, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> PuzzleOutput:
        """Run the model on a batch of puzzles.

        Args:
          inputs: symbols, (B, L) or (B, H, W) int.
          state: start from this state, such as that of an earlier output; None: from `initial_state`.
          solve: how to solve for the equilibrium; None: `fixed_point` with its defaults. Ignored without an equilibrium.
          key: draws the initial state, in training.
        """
        raise NotImplementedError
