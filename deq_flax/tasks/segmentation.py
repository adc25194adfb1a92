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
from deq_flax.models.mdeq import MDEQ
from deq_flax.task import Batch, Controls, LossOutput, Metrics, Phase, average
from deq_flax.tasks.drawing import overlays
from deq_flax.tasks.images import ImageTask, confusion
from deq_flax.tasks.multiscale_inference import Views
from deq_flax.tasks.pixel_loss import PixelLoss
from deq_flax.train.phases import add_solver, ordered


class SegmentationTask(ImageTask):
    """An MDEQ on images with a class for each pixel.

    Args:
      data, model, deq, loss: these sections of the config.
      seed: decides order, augmentation, which steps add the Jacobian loss, and their step limits.

    Raises:
      UserError: the images cannot be had, or a value makes no sense.
    """

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        model: Mapping[str, Any],
        deq: Mapping[str, Any],
        loss: Mapping[str, Any],
        seed: int,
    ):
        options = SceneOptions(**{name: data[name] for name in SceneOptions.__dataclass_fields__})
        scenes = load_scenes(data["name"], data["path"], options, num_classes=model["num_classes"])
        super().__init__(scenes, data=data, model=model, deq=deq, kind="segmentation", seed=seed)
        self._loss = PixelLoss(**loss)
        self._loss.check(len(self.class_names))
        self._views = Views(**{name: data[f"eval_{name}"] for name in Views.__dataclass_fields__})

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
        """Mean cross entropy, weighted by class, of the pixels that count (in training, the hard ones), plus the Jacobian loss.

        In evaluation, of the probabilities averaged over the views of an image.
        """
        images = self.normalise(batch["images"])
        labels = batch["labels"].astype(jnp.int32)
        counts = (labels != IGNORE) & (batch["mask"][:, None, None] > 0)
        labels = jnp.where(counts, labels, 0)
        jacobian_loss = None
        if key is None:
            log_p, stats = self._views.predict(lambda x: self._logits(model, x, controls), images)
        else:
            output = self.run_model(model, images, phase=phase, controls=controls, key=key, probe=probe)
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
        value, metrics = add_solver(value, metrics, stats, jacobian_loss, controls)
        return value, LossOutput(carry, metrics)

    def _logits(self, model: MDEQ, images: jax.Array, controls: Controls | None) -> tuple[jax.Array, Any]:
        output = self.run_model(model, images, phase=None, controls=controls, key=None, probe=None)
        return output.logits, output.stats

    def summary(self, split: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Intersection over union, mean of the classes that occur or are predicted, pixel accuracy; in evaluation, by class."""
        numbers = ordered(metrics, "loss")
        if "confusion" not in metrics:
            return numbers
        table = np.asarray(metrics["confusion"], np.float64)
        iou_K = intersection_over_union(table)
        head = {"loss": numbers.pop("loss")} if "loss" in numbers else {}
        head["miou"] = float(np.nanmean(iou_K)) if np.isfinite(iou_K).any() else 0.0
        head["accuracy"] = float(np.trace(table) / max(table.sum(), 1e-9))
        if split == "train":
            return head | numbers
        by_class = {f"iou/{name}": float(iou) for name, iou in zip(self.class_names, iou_K, strict=True) if np.isfinite(iou)}
        return self.with_damage(split, head | numbers | by_class)

    def picture_arrays(self, model: MDEQ, batch: Batch) -> jax.Array:
        """(B, H, W) predicted classes."""
        log_p, _ = self._views.predict(lambda x: self._logits(model, x, None), self.normalise(batch["images"]))
        return jnp.argmax(log_p, axis=3)

    def pictures(self, batch: Batch, arrays: Any) -> dict[str, np.ndarray]:
        """Image, truth and prediction side by side."""
        return {"predictions": overlays(batch["images"], batch["labels"], np.asarray(arrays), self.class_names, IGNORE)}


def intersection_over_union(confusion_KK: np.ndarray) -> np.ndarray:
    """(K,) by class; NaN where a class neither occurs nor is predicted."""
    both = np.diag(confusion_KK)
    either = confusion_KK.sum(axis=0) + confusion_KK.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1e-9), np.nan)
