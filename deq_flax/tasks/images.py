"""What the tasks on images share: an MDEQ, batches by number, nothing carried.

B batch, H height, W width, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_flax.data.images.files import Damaged
from deq_flax.data.loading import EvalBatches, Examples, TrainBatches
from deq_flax.data.text.segments import iterate, segment_dataset
from deq_flax.errors import UserError
from deq_flax.models.mdeq import MDEQ, MDEQOutput
from deq_flax.task import Batch, Batches, Controls, Phase
from deq_flax.tasks.checks import check_least, check_model
from deq_flax.train.phases import EquilibriumRecipe


class Data(Protocol):
    """What `data.images.load_images` and `data.segmentation.load_scenes` give."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def damaged(self) -> Damaged: ...

    def split(self, name: str) -> Any: ...


class ImageTask:
    """An MDEQ on images; a base for the tasks, which add data and loss.

    Args:
      images: the data.
      data, model, deq: these sections of the config.
      kind: of the model's head.
      seed: decides order, augmentation, which steps add the Jacobian loss, and their step limits.

    Raises:
      UserError: a value makes no sense, or the model does not suit the data.
    """

    head = "head"

    def __init__(
        self,
        images: Data,
        *,
        data: Mapping[str, Any],
        model: Mapping[str, Any],
        deq: Mapping[str, Any],
        kind: str,
        seed: int,
    ):
        self.recipe = EquilibriumRecipe(**deq, seed=seed)
        self.images, self.class_names = images, images.class_names
        self.batch_size, self.eval_batch_size = data["batch_size"], data["eval_batch_size"]
        self._pictures = data["pictures"]
        check_least(data, 1, "batch_size", "eval_batch_size")
        check_least(data, 0, "pictures")
        self._seed = seed
        TrainBatches(images.split("train"), self.batch_size, seed)  # too few examples are refused now
        self._model = dict(model)
        for name, found in (("num_classes", len(self.class_names)), ("in_channels", images.split("train").shape[-1])):
            if model[name] != found:
                raise UserError(f"model.{name} is {model[name]}, but the data has {found}: set it to that")
        if model["head"] != kind:
            raise UserError(f"model.head is {model['head']!r}, but this task needs {kind!r}")
        self._mean_C, self._std_C = _normalisation(data["mean"], data["std"], model["in_channels"])
        check_model(self.build_model)

    def build_model(self, rngs: nnx.Rngs) -> MDEQ:
        return MDEQ(**self._model, rngs=rngs)

    def train_batches(self, step: int, rows: slice | None = None) -> Iterator[Batch]:
        examples: Examples = self.images.split("train")
        return iterate(segment_dataset(TrainBatches(examples, self.batch_size, self._seed, rows)), step)

    def eval_batches(self, split: str, rows: slice | None = None) -> Batches:
        return EvalBatches(self.images.split(split), self.eval_batch_size, rows)

    def fresh_carry(self, model: MDEQ, batch_size: int) -> tuple[()]:
        return ()

    def phase(self, step: int) -> Phase:
        return self.recipe.phase(step)

    def controls(self, step: int) -> Controls:
        return self.recipe.controls(step)

    def work(self, seconds_per_step: float) -> dict[str, float]:
        return {"examples_per_second": self.batch_size / seconds_per_step}

    def picture_batch(self) -> Batch | None:
        if not self._pictures:
            return None
        examples: Examples = self.images.split("valid")
        # Spread over the split: neighbours may be of one class, or frames of one film.
        return examples.read(np.linspace(0, len(examples) - 1, min(self._pictures, len(examples))).astype(int), None)

    def spectral_radius(self, model: MDEQ, batch: Batch, carry: tuple[()], key: Any) -> jax.Array:
        """(B,) at the equilibria of a batch."""
        equation = model.equation(self.normalise(batch["images"]))
        return self.recipe.spectral_radius(equation.f, equation.z0, key)

    def normalise(self, images_BHWC: jax.Array) -> jax.Array:
        """uint8 to floats, on the device: a quarter of the bytes travel there."""
        return (images_BHWC / 255 - self._mean_C[None, None, None]) / self._std_C[None, None, None]

    def run_model(
        self,
        model: MDEQ,
        images_BHWC: jax.Array,
        *,
        phase: Phase | None,
        controls: Controls | None,
        key: Any,
        probe: jax.Array | None,
    ) -> MDEQOutput:
        """The model as this phase has it; arguments as of `Task.loss`."""
        return model(images_BHWC, **self.recipe.model_options(phase, controls, key, probe))

    def with_damage(self, split: str, summary: dict[str, float]) -> dict[str, float]:
        """In evaluation, how many images of all splits were skipped so far, if any."""
        count = len(self.images.damaged.names)
        return summary | ({"skipped_images": float(count)} if count and split != "train" else {})


def confusion(labels: jax.Array, predicted: jax.Array, weights: jax.Array, classes: int) -> jax.Array:
    """(K, K) how often each label (row) was predicted as each class (column). Arguments of one shape; labels below K.

    A product of one-hot matrices: exact up to 2^24 of one kind in a batch, and much faster than scattering on an accelerator.
    """
    truth = jax.nn.one_hot(labels.reshape(-1), classes) * weights.reshape(-1, 1)
    return jnp.matmul(truth.T, jax.nn.one_hot(predicted.reshape(-1), classes), precision=jax.lax.Precision.HIGHEST)


def _normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> tuple[np.ndarray, np.ndarray]:
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(f"data.mean and data.std need {channels} numbers each, those of std positive, not {mean} and {std}")
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)
