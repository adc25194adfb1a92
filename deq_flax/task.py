"""What a task is: the only thing the trainer knows of language, classification or segmentation.

A task joins data, model, loss and metrics. The trainer owns time: steps, the optimizer, checkpoints, reports, devices.
Everything a task remembers from one batch to the next (Transformer-XL memory, for one) is the *carry*: an explicit pytree
that goes into `loss`, comes out of it, is checkpointed, and starts afresh in evaluation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import nnx

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


@dataclass(frozen=True)
class Phase:
    """What a training step does. Static: each distinct phase is compiled once."""

    unrolled: bool = False
    """Apply the cell a fixed number of times and differentiate through it (pretraining), instead of solving."""
    jacobian_loss: bool = False
    """Add the Jacobian regulariser to the loss."""

    def __str__(self) -> str:
        return ("unrolled pretraining" if self.unrolled else "equilibrium") + " with Jacobian loss" * self.jacobian_loss


class Controls(NamedTuple):
    """Numbers that change from step to step within a phase. Traced: they never recompile."""

    max_steps: Any
    """int32 scalar, limit on the evaluations of this step's forward solve."""
    jacobian_weight: Any
    """float32 scalar."""


class LossOutput(NamedTuple):
    """What `Task.loss` returns beside the scalar to differentiate."""

    carry: Carry
    metrics: Metrics


class Batches(Protocol):
    """Whole batches by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


class Task(Protocol):
    """One problem to train on. Methods are pure: state in, state out."""

    def build_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """A freshly initialised model."""
        ...

    @property
    def batch_size(self) -> int:
        """Of training."""
        ...

    @property
    def eval_batch_size(self) -> int:
        """Of evaluation."""
        ...

    def train_batches(self, step: int, rows: slice | None = None) -> Iterator[Batch]:
        """The batches of training steps `step`, `step` + 1, ... without end; steps count from 0.

        Each is a function of its step alone, so that a run resumes by its number. `rows`: of every batch, the only ones to
        read, as each of several processes does; what a row holds does not depend on it.
        """
        ...

    def eval_batches(self, split: str, rows: slice | None = None) -> "Batches":
        """Every batch of 'valid' or 'test', in order; `rows` as in `train_batches`."""
        ...

    def fresh_carry(self, model: nnx.Module, batch_size: int) -> Carry:
        """The carry at the start of a stream."""
        ...

    def phase(self, step: int) -> Phase:
        """What training step `step` does; a function of the step alone."""
        ...

    def controls(self, step: int) -> Controls:
        """The numbers of training step `step`; a function of the step alone."""
        ...

    def loss(
        self,
        model: nnx.Module,
        batch: Batch,
        carry: Carry,
        *,
        phase: Phase | None = None,
        controls: Controls | None = None,
        key: jax.Array | None = None,
        probe: jax.Array | None = None,
    ) -> tuple[jax.Array, LossOutput]:
        """The scalar to minimise, the next carry and the metrics.

        Evaluation gives neither phase nor key, and controls only to limit evaluations: nothing random happens then. The
        gradient with respect to `probe` carries the statistics of the adjoint solve (see
        `equilibrium.gradients.backward_probe`).
        """
        ...

    def summary(self, split: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """What a person wants to read, from divided metrics: a perplexity from a mean loss, and the like.

        Numbers alone: a metric that is an array, such as a confusion matrix, is summed up in some.
        """
        ...

    def work(self, seconds_per_step: float) -> dict[str, float]:
        """The speed of training in the task's own unit, such as `tokens_per_second`."""
        ...


@runtime_checkable
class HasSpectralRadius(Protocol):
    """A task that can tell how contracting its equilibria are."""

    def spectral_radius(self, model: Any, batch: Batch, carry: Carry, key: Any) -> jax.Array:
        """(B,): of the Jacobian of f at the equilibrium of each member of the batch; below 1, plain iteration converges."""
        ...


@runtime_checkable
class HasWords(Protocol):
    """A task whose ids may stand for words. A run keeps them: to write with its model then needs no text."""

    @property
    def words(self) -> Sequence[str] | None:
        """By their ids; None where only ids are known."""
        ...


@runtime_checkable
class HasPictures(Protocol):
    """A task that can show what its model makes of some examples."""

    def picture_batch(self) -> Batch | None:
        """The examples, from the validation split; None if no pictures are wanted."""
        ...

    def picture_arrays(self, model: Any, batch: Batch) -> Any:
        """What the pictures are made from, a pytree of arrays. Compiled: the part that runs the model."""
        ...

    def pictures(self, batch: Batch, arrays: Any) -> dict[str, Any]:
        """(H, W, 3) uint8 by name."""
        ...


@runtime_checkable
class HasHead(Protocol):
    """A task whose model can start from one that was trained for something else, but for its head."""

    @property
    def head(self) -> str:
        """The head's place among the parameters: their names begin with it and a '/'."""
        ...
