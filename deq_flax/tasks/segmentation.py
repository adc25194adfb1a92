"""Semantic segmentation: one class for each pixel.

B batch, H height, W width, K classes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_flax.data.images.scene_datasets import SceneOptions, load_scenes
from deq_flax.data.images.scenes import IGNORE
from deq_flax.equilibrium.solution import Solve
from deq_flax.task import Batch, LossOutput, Metrics, average
from deq_flax.tasks.drawing import overlays
from deq_flax.tasks.images import ImageTask, confusion
from deq_flax.tasks.multiscale_inference import MultiscaleInference
from deq_flax.tasks.pixel_loss import PixelLoss


class SegmentationTask(ImageTask):
    """An image model on images with a class for each pixel.

    Args:
      data, model, loss: these sections of the config.
      seed: decides order and augmentation.

    Raises:
      UserError: the images cannot be read, or an option does not suit them.
    """

    Data, Loss = SceneOptions, PixelLoss

    def __init__(self, data: SceneOptions, model: Any, *, loss: PixelLoss | None = None, seed: int = 0):
        scenes = load_scenes(data, model.num_classes)
        super().__init__(scenes, data=data, model=model, head="segmentation", seed=seed)
        self._loss = loss or PixelLoss()
        self._loss.check(len(self.class_names))
        self._inference = MultiscaleInference(
            scales=data.eval_scales, flip=data.eval_flip, window=data.eval_window, size=data.eval_size
        )

    def loss(
        self, model: Any, batch: Batch, carry: tuple[()], *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, LossOutput]:
        """Mean cross entropy, weighted by class, of the pixels that count (in training, the hard ones).

        In evaluation it is that of the probabilities averaged over the scales, flips and windows of an image.
        """
        images = self.normalize(batch["images"])
        labels = batch["labels"].astype(jnp.int32)
        counts = (labels != IGNORE) & (batch["mask"][:, None, None] > 0)
        labels = jnp.where(counts, labels, 0)
        jacobian_loss = None
        if key is None:
            log_p, stats = self._inference.predict(lambda x: _logits(model, x, solve), images)
        else:
            output = model(images, solve=solve, key=key)
            log_p, stats = jax.nn.log_softmax(output.logits.astype(jnp.float32)), output.stats
            jacobian_loss = output.jacobian_loss
        classes = log_p.shape[-1]
        nll_BHW = -jnp.take_along_axis(log_p, labels[..., None], axis=3)[..., 0]
        weight_BHW = self._loss.weights(labels)
        kept_BHW = weight_BHW * (counts if key is None else self._loss.keep(nll_BHW, counts))
        total, count = jnp.sum(nll_BHW * kept_BHW), jnp.sum(kept_BHW)
        value = total / jnp.maximum(count, 1e-6)
        table = confusion(labels, jnp.argmax(log_p, axis=3), counts.astype(jnp.float32), classes)
        metrics: Metrics = {"loss": average(total, count), "confusion": average(table)}
        return value, LossOutput(carry, metrics, stats, jacobian_loss)

    def summary(self, split: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Intersection over union, mean of the classes that occur or are predicted, pixel accuracy; in evaluation, by class."""
        numbers = {"loss": metrics["loss"]} if "loss" in metrics else {}
        if "confusion" not in metrics:
            return numbers
        table = np.asarray(metrics["confusion"], np.float64)
        iou_K = intersection_over_union(table)
        numbers["miou"] = float(np.nanmean(iou_K)) if np.isfinite(iou_K).any() else 0.0
        numbers["accuracy"] = float(np.trace(table) / max(table.sum(), 1e-9))
        if split == "train":
            return numbers
        by_class = {f"iou/{name}": float(iou) for name, iou in zip(self.class_names, iou_K, strict=True) if np.isfinite(iou)}
        return numbers | by_class | self.skipped_images(split)

    def picture_arrays(self, model: Any, batch: Batch, *, solve: Solve | None) -> jax.Array:
        """Predicted classes (B, H, W)."""
        log_p, _ = self._inference.predict(lambda x: _logits(model, x, solve), self.normalize(batch["images"]))
        return jnp.argmax(log_p, axis=3)

    def pictures(self, batch: Batch, arrays: Any) -> dict[str, np.ndarray]:
        """Image, truth and prediction side by side."""
        return {"predictions": overlays(batch["images"], batch["labels"], np.asarray(arrays), self.class_names, IGNORE)}


def _logits(model: Any, images: jax.Array, solve: Solve | None) -> tuple[jax.Array, Any]:
    output = model(images, solve=solve)
    return output.logits, output.stats


def intersection_over_union(confusion_KK: np.ndarray) -> np.ndarray:
    """(K,) by class; NaN where a class neither occurs nor is predicted."""
    both = np.diag(confusion_KK)
    either = confusion_KK.sum(axis=0) + confusion_KK.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1e-9), np.nan)
