"""Image classification: one label for an image.

B batch, K classes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_flax.data.images.labeled_datasets import ImageOptions, load_images
from deq_flax.equilibrium.solution import Solve
from deq_flax.task import Batch, LossOutput, Metrics, average
from deq_flax.tasks.drawing import labeled_grid
from deq_flax.tasks.images import ImageTask, confusion

CONFUSION_CLASSES = 100
"""The most classes for which a confusion matrix is counted: a larger one could not be read."""


class ClassificationTask(ImageTask):
    """An image model on labeled images.

    Args:
      data, model: these sections of the config.
      seed: decides order and augmentation.

    Raises:
      UserError: the images cannot be read, or an option does not suit them.
    """

    Data, Loss = ImageOptions, None

    def __init__(self, data: ImageOptions, model: Any, *, seed: int = 0):
        super().__init__(load_images(data), data=data, model=model, head="classification", seed=seed)

    def loss(
        self, model: Any, batch: Batch, carry: tuple[()], *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, LossOutput]:
        """Mean cross entropy of the images that count."""
        output = model(self.normalize(batch["images"]), solve=solve, key=key)
        logits_BK, labels_B, mask_B = output.logits.astype(jnp.float32), batch["labels"], batch["mask"]
        count = jnp.sum(mask_B)
        score_B1 = jnp.take_along_axis(logits_BK, labels_B[:, None], axis=1)
        total = jnp.sum((jax.nn.logsumexp(logits_BK, axis=1) - score_B1[:, 0]) * mask_B)
        rank_B = jnp.sum(logits_BK > score_B1, axis=1)  # the number of classes before the right one
        metrics: Metrics = {"loss": average(total, count), "accuracy": average(jnp.sum((rank_B < 1) * mask_B), count)}
        classes = logits_BK.shape[1]
        if classes > 5:
            metrics["top5_accuracy"] = average(jnp.sum((rank_B < 5) * mask_B), count)
        if key is None and classes <= CONFUSION_CLASSES:
            metrics["confusion"] = average(confusion(labels_B, jnp.argmax(logits_BK, axis=1), mask_B, classes))
        value = total / jnp.maximum(count, 1.0)
        return value, LossOutput(carry, metrics, output.stats, output.jacobian_loss)

    def summary(self, split: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """All metrics but the confusion matrix."""
        numbers = {name: metrics[name] for name in ("loss", "accuracy", "top5_accuracy") if name in metrics}
        return numbers | self.skipped_images(split)

    def picture_arrays(self, model: Any, batch: Batch, *, solve: Solve | None) -> jax.Array:
        """Probabilities (B, K)."""
        output = model(self.normalize(batch["images"]), solve=solve)
        return jax.nn.softmax(output.logits.astype(jnp.float32))

    def pictures(self, batch: Batch, arrays: Any) -> dict[str, np.ndarray]:
        """The images with the right label and the predicted one with its probability; a red frame where they differ."""
        probabilities_BK = np.asarray(arrays)
        return {"predictions": labeled_grid(batch["images"], batch["labels"], probabilities_BK, self.class_names)}
