"""The Task protocol: all that the trainer knows of language modeling, classification, segmentation or reasoning.

A task joins data, model, loss and metrics. The trainer owns time: steps, phases, the optimizer, checkpoints, the run log,
devices. Everything a task remembers from one batch to the next (Transformer-XL memory, for one) is the *carry*: an explicit
pytree that goes into `loss`, comes out of it, is checkpointed, and starts afresh in evaluation.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import nnx

from deq_flax.equilibrium.solution import Solve, SolverStats

Batch = Mapping[str, Any]
"""Arrays by name, every one with the batch as its leading axis."""

Carry = Any
"""A pytree of arrays, every one with the batch as its leading axis."""

Metrics = dict[str, clu_metrics.Average]
"""Sums and counts by name: merged over devices, micro-batches and steps, then divided once."""


def average(total: Any, count: Any = 1.0) -> clu_metrics.Average:
    """A metric whose value is total / count, once both have been summed over everything."""
    total, count = jnp.asarray(total, float), jnp.asarray(count, float)
    return clu_metrics.Average(total=total, count=count)  # ty: ignore[unknown-argument]


class LossOutput(NamedTuple):
    """Results of `Task.loss` beside the scalar to differentiate."""

    carry: Carry
    metrics: Metrics
    stats: SolverStats | None = None
    """Statistics of the forward solve; None for a model without an equilibrium."""
    jacobian_loss: jax.Array | None = None
    """Scalar that the trainer adds to the loss with the phase's weight; None in steps without it."""


class Batches(Protocol):
    """Whole batches by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


class Task(Protocol):
    """One problem to train on. Methods are pure: state in, state out."""

    @property
    def model_options(self) -> Any:
        """The options of the model, with everything that was left to the data filled in: a checkpoint's config holds these."""
        ...

    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A freshly initialized model."""
        ...

    @property
    def batch_size(self) -> int:
        """The batch size of training."""
        ...

    @property
    def eval_batch_size(self) -> int:
        """The batch size of evaluation."""
        ...

    def train_batches(self, step: int, rows: slice | None = None) -> Iterator[Batch]:
        """The batches of training steps `step`, `step` + 1, ... without end; steps count from 0.

        Each is a function of its step alone, so that a run resumes by its step number. `rows`: the only rows of every batch to
        read, as each of several processes does; the content of a row does not depend on it.
        """
        ...

    def eval_batches(self, split: str, rows: slice | None = None) -> "Batches":
        """All batches of 'valid' or 'test', in order; `rows` as in `train_batches`."""
        ...

    def fresh_carry(self, model: nnx.Module, batch_size: int) -> Carry:
        """The carry at the start of a stream."""
        ...

    def loss(
        self, model: nnx.Module, batch: Batch, carry: Carry, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, LossOutput]:
        """The scalar to minimize, the next carry, the metrics, and the statistics of the solve.

        Args:
          solve: how to solve for the equilibrium, handed to the model as it is; None: with the library's defaults. A model
            without an equilibrium gets None too.
          key: the random key of a training step. None is evaluation: nothing is random, running statistics are used.
        """
        ...

    def summary(self, split: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The task's numbers for the log from divided metrics, the most important first, such as a perplexity of a mean loss.

        Every value is a number: an array, such as a confusion matrix, is reduced to numbers.
        """
        ...

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        """The speed of training in the task's unit, such as `tokens_per_second`."""
        ...


@runtime_checkable
class HasEquation(Protocol):
    """A task whose equation can be solved outside of the loss: for the spectral radius, and for plots."""

    def equation(self, model: Any, batch: Batch, carry: Carry) -> tuple[Callable[[Any], Any], Any]:
        """The equation of a batch in evaluation: (f, z0)."""
        ...


@runtime_checkable
class HasVocabulary(Protocol):
    """A task whose ids may stand for text. A run stores what decodes them, so that generation needs no data."""

    @property
    def vocabulary_file(self) -> tuple[str, str] | None:
        """Name and content of the file that decodes ids; None where only ids are known."""
        ...


@runtime_checkable
class HasPictures(Protocol):
    """A task that can show predictions for some examples."""

    def picture_batch(self) -> Batch | None:
        """The examples, from the validation split; None if no pictures are wanted."""
        ...

    def picture_arrays(self, model: Any, batch: Batch, *, solve: Solve | None) -> Any:
        """The arrays that pictures are drawn from, a pytree. Compiled: the part that runs the model."""
        ...

    def pictures(self, batch: Batch, arrays: Any) -> dict[str, Any]:
        """Pictures (H, W, 3) uint8 by name."""
        ...


@runtime_checkable
class HasHead(Protocol):
    """A task whose model can start from one that was trained for something else, but for its head."""

    @property
    def head(self) -> str:
        """The module of the head: the names of its parameters begin with it and a '/'."""
        ...


@runtime_checkable
class HasRestarts(Protocol):
    """A task whose equilibria can be solved for from several random starts, of which the best counts."""

    def with_restarts(self, count: int) -> Task:
        """This task, evaluated from `count` starts. UserError: its model's start is not random."""
        ...


@runtime_checkable
class ChecksWeights(Protocol):
    """A task that tells whether weights are its own where their shapes do not."""

    def check_weights(self, config: Any) -> None:
        """Raise UserError if what was learned under a stored config, nested plain data, is no answer to this task."""
        ...
