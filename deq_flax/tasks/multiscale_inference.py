"""Inference at several scales, mirrored, whole or through a sliding window, the probabilities averaged.

B batch, H height, W width, C channels, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_flax.errors import UserError
from deq_flax.nn.resize import resize_bilinear

Predict = Callable[[jax.Array], tuple[jax.Array, Any]]
"""Images (B, H, W, C) -> logits (B, H, W, K) and the statistics of the solve."""


@dataclass(frozen=True, kw_only=True)
class MultiscaleInference:
    """The inputs made from one image whose probabilities are averaged."""

    scales: Sequence[float]
    """Sizes relative to the image."""
    flip: bool
    """Use the mirrored image as an input too."""
    window: tuple[int, int]
    """Height and width of a window that slides over the (scaled) image by two thirds of its size; (0, 0): the whole image."""
    size: tuple[int, int]
    """Height and width of the images."""

    def __post_init__(self):
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"data.eval_scales must hold positive numbers, not {self.scales}")
        if (self.window[0] < 1 or self.window[1] < 1) and tuple(self.window) != (0, 0):
            raise UserError(f"data.eval_window is a height and a width, or 0,0 for none, not {self.window}")
        smallest = [round(side * min(self.scales)) for side in self.size]
        if self.window[0] > smallest[0] or self.window[1] > smallest[1]:
            raise UserError(f"data.eval_window {self.window} is larger than the image at its smallest scale, {tuple(smallest)}")

    def predict(self, predict: Predict, images_BHWC: jax.Array) -> tuple[jax.Array, Any]:
        """Log probabilities (B, H, W, K), averaged as probabilities, and the statistics of the first solve."""
        height, width = images_BHWC.shape[1:3]
        if len(self.scales) == 1 and self.scales[0] == 1 and not self.flip and not self.window[0]:
            logits, stats = predict(images_BHWC)
            return jax.nn.log_softmax(logits.astype(jnp.float32)), stats
        total, first, count = jnp.zeros(()), None, 0
        for scale in self.scales:
            size = round(height * scale), round(width * scale)
            scaled = images_BHWC if size == (height, width) else _resize(images_BHWC, size)
            for mirrored in (False, True) if self.flip else (False,):
                p_BHWK, stats = self._probabilities(predict, scaled[:, :, ::-1] if mirrored else scaled)
                p_BHWK = p_BHWK[:, :, ::-1] if mirrored else p_BHWK
                total = total + resize_bilinear(p_BHWK, (height, width))
                first, count = (stats if first is None else first), count + 1
        return jnp.log(jnp.maximum(total / count, 1e-30)), first

    def _probabilities(self, predict: Predict, images_BHWC: jax.Array) -> tuple[jax.Array, Any]:
        """Probabilities at one image size; overlapping windows are averaged. One program runs for all windows in turn."""
        height, width = images_BHWC.shape[1:3]
        if not self.window[0] or tuple(self.window) == (height, width):
            logits, stats = predict(images_BHWC)
            return jax.nn.softmax(logits.astype(jnp.float32)), stats
        places = np.array([(y, x) for y in starts(height, self.window[0]) for x in starts(width, self.window[1])], np.int32)
        seen = np.zeros((1, height, width, 1), np.float32)
        for y, x in places:
            seen[:, y : y + self.window[0], x : x + self.window[1]] += 1

        def window_at(place: jax.Array) -> tuple[jax.Array, Any]:
            view = lax.dynamic_slice(images_BHWC, (0, place[0], place[1], 0), _sized(images_BHWC, self.window))
            logits, stats = predict(view)
            return jax.nn.softmax(logits.astype(jnp.float32)), stats

        def add(total: jax.Array, place: jax.Array) -> tuple[jax.Array, Any]:
            p, stats = window_at(place)
            at = (0, place[0], place[1], 0)
            return lax.dynamic_update_slice(total, lax.dynamic_slice(total, at, p.shape) + p, at), stats

        classes = jax.eval_shape(window_at, places[0])[0].shape[-1]
        total, stats = lax.scan(add, jnp.zeros((len(images_BHWC), height, width, classes)), jnp.asarray(places))
        return total / seen, jax.tree.map(lambda x: x[0], stats)


def starts(length: int, window: int) -> list[int]:
    """The offsets of windows that cover a length, two thirds of a window apart, the last one at the end."""
    step = max(1, window * 2 // 3)
    return [*range(0, length - window, step), length - window]


def _resize(images_BHWC: jax.Array, size: tuple[int, int]) -> jax.Array:
    return jax.image.resize(images_BHWC, _sized(images_BHWC, size), "bilinear")


def _sized(images_BHWC: jax.Array, size: Sequence[int]) -> tuple[int, ...]:
    return images_BHWC.shape[0], size[0], size[1], images_BHWC.shape[3]
