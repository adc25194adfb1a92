"""Image classification: one label for an image.

B batch, K classes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_flax.data.images.labeled_datasets import ImageOptions, load_images
from deq_flax.models.mdeq import MDEQ
from deq_flax.task import Batch, Controls, LossOutput, Metrics, Phase, average
from deq_flax.tasks.drawing import labelled_grid
from deq_flax.tasks.images import ImageTask, confusion
from deq_flax.train.phases import add_solver, ordered

CONFUSION_CLASSES = 100
"""With more classes, no confusion matrix is counted: nobody could read it."""


class ClassificationTask(ImageTask):
    """An MDEQ on labelled images.

    Args:
      data, model, deq: these sections of the config.
      seed: decides order, augmentation, which steps add the Jacobian loss, and their step limits.

    Raises:
      UserError: the images cannot be had, or a value makes no sense.
    """

    def __init__(self, *, data: Mapping[str, Any], model: Mapping[str, Any], deq: Mapping[str, Any], seed: int):
        options = ImageOptions(**{name: data[name] for name in ImageOptions.__dataclass_fields__})
        images = load_images(data["name"], data["path"], options)
        super().__init__(images, data=data, model=model, deq=deq, kind="classification", seed=seed)

    def loss(
        self,
        model: MDEQ,
        batch: Batch,
        carry: tuple[()],
        *,
        phase: Phase | None = None,
        controls: Controls | None = None,
        key: Any = None,
        probe: jax.Array | None = None,
    ) -> tuple[jax.Array, LossOutput]:
        """Mean cross entropy of the images that count, plus the Jacobian loss in phases that have it."""
        images = self.normalise(batch["images"])
        output = self.run_model(model, images, phase=phase, controls=controls, key=key, probe=probe)
        logits_BK, labels_B, mask_B = output.logits.astype(jnp.float32), batch["labels"], batch["mask"]
        count = jnp.sum(mask_B)
        score_B1 = jnp.take_along_axis(logits_BK, labels_B[:, None], axis=1)
        total = jnp.sum((jax.nn.logsumexp(logits_BK, axis=1) - score_B1[:, 0]) * mask_B)
        rank_B = jnp.sum(logits_BK > score_B1, axis=1)  # how many classes come before the right one
        metrics: Metrics = {"loss": average(total, count), "accuracy": average(jnp.sum((rank_B < 1) * mask_B), count)}
        classes = logits_BK.shape[1]
        if classes > 5:
            metrics["top5_accuracy"] = average(jnp.sum((rank_B < 5) * mask_B), count)
        if key is None and classes <= CONFUSION_CLASSES:
            metrics["confusion"] = average(confusion(labels_B, jnp.argmax(logits_BK, axis=1), mask_B, classes))
        value = total / jnp.maximum(count, 1.0)
        value, metrics = add_solver(value, metrics, output.stats, output.jacobian_loss, controls)
        return value, LossOutput(carry, metrics)

    def summary(self, split: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """All but the confusion matrix."""
        return self.with_damage(split, ordered(metrics, "loss", "accuracy", "top5_accuracy"))

    def picture_arrays(self, model: MDEQ, batch: Batch) -> jax.Array:
        """(B, K) probabilities."""
        output = self.run_model(model, self.normalise(batch["images"]), phase=None, controls=None, key=None, probe=None)
        return jax.nn.softmax(output.logits.astype(jnp.float32))

    def pictures(self, batch: Batch, arrays: Any) -> dict[str, np.ndarray]:
        """The images with the right label and the predicted one, its probability behind it; a red frame where they differ."""
        probabilities_BK = np.asarray(arrays)
        return {"predictions": labelled_grid(batch["images"], batch["labels"], probabilities_BK, self.class_names)}
