"""The base of the tasks on images: batches by number, normalization, nothing carried.

B batch, H height, W width, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_flax.data.images.files import DamagedFiles
from deq_flax.data.loading import EvalBatches, Examples, iterate, train_dataset
from deq_flax.errors import UserError
from deq_flax.models import abstract_model, build_model
from deq_flax.task import Batch, Batches


class Data(Protocol):
    """A data set of images, as the loaders of `data.images` return it."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def damaged(self) -> DamagedFiles: ...

    def split(self, name: str) -> Any: ...


class ImageTask:
    """An image model on images; a base for the tasks, which add data and loss.

    Args:
      images: the data set.
      data, model: these sections of the config.
      head: the head of the model that the task needs.
      seed: decides order and augmentation.

    Raises:
      UserError: an option is invalid, or the model does not suit the data.
    """

    kind = "image"
    head = "head"

    def __init__(self, images: Data, *, data: Any, model: Any, head: str, seed: int):
        self.images, self.class_names, self.model_options = images, images.class_names, model
        self.batch_size, self.eval_batch_size = data.batch_size, data.eval_batch_size
        self._pictures, self._seed = data.pictures, seed
        train_dataset(images.split("train"), self.batch_size, seed=seed)  # too few examples are refused now
        for name, found in (("num_classes", len(self.class_names)), ("in_channels", images.split("train").shape[-1])):
            if getattr(model, name) != found:
                raise UserError(f"model.{name} is {getattr(model, name)}, but the data has {found}: set it to that")
        if model.head != head:
            raise UserError(f"model.head is {model.head!r}, but this task needs {head!r}")
        self._mean_C, self._std_C = _normalization(data.mean, data.std, model.in_channels)
        abstract_model(model)

    def build_model(self, rngs: nnx.Rngs) -> Any:
        return build_model(self.model_options, rngs=rngs)

    def train_batches(self, step: int, rows: slice | None = None) -> Iterator[Batch]:
        return iterate(train_dataset(self.images.split("train"), self.batch_size, seed=self._seed, rows=rows), step)

    def eval_batches(self, split: str, rows: slice | None = None) -> Batches:
        return EvalBatches(self.images.split(split), self.eval_batch_size, rows)

    def fresh_carry(self, model: Any, batch_size: int) -> tuple[()]:
        return ()

    def equation(self, model: Any, batch: Batch, carry: tuple[()]) -> tuple[Callable[[Any], Any], Any]:
        f, z0, *_ = model.equation(self.normalize(batch["images"]))
        return f, z0

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        return {"examples_per_second": self.batch_size / seconds_per_step}

    def picture_batch(self) -> Batch | None:
        if not self._pictures:
            return None
        examples: Examples = self.images.split("valid")
        # Spread over the split: neighbors may be of one class, or frames of one film.
        return examples.read(np.linspace(0, len(examples) - 1, min(self._pictures, len(examples))).astype(int), None)

    def normalize(self, images_BHWC: jax.Array) -> jax.Array:
        """uint8 to floats, on the device: a quarter of the bytes travel there."""
        return (images_BHWC / 255 - self._mean_C[None, None, None]) / self._std_C[None, None, None]

    def skipped_images(self, split: str) -> dict[str, float]:
        """The number of damaged images of all splits that evaluation has skipped so far, if any."""
        count = len(self.images.damaged.names)
        return {"skipped_images": float(count)} if count and split != "train" else {}


def confusion(labels: jax.Array, predicted: jax.Array, weights: jax.Array, classes: int) -> jax.Array:
    """(K, K) counts of each label (row) predicted as each class (column). Arguments of one shape; labels below K.

    A product of one-hot matrices: exact up to 2^24 of one kind in a batch, and much faster than scattering on an accelerator.
    """
    truth = jax.nn.one_hot(labels.reshape(-1), classes) * weights.reshape(-1, 1)
    return jnp.matmul(truth.T, jax.nn.one_hot(predicted.reshape(-1), classes), precision=jax.lax.Precision.HIGHEST)


def _normalization(mean: Sequence[float], std: Sequence[float], channels: int) -> tuple[np.ndarray, np.ndarray]:
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(f"data.mean and data.std need {channels} numbers each, those of std positive, not {mean} and {std}")
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)
