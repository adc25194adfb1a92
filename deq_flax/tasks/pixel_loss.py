"""Cross entropy over pixels: weighted by class, over all pixels or the hard ones.

B batch, H height, W width, K classes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from deq_flax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PixelLoss:
    """Section `loss` of a segmentation config."""

    class_weights: tuple[float, ...] = ()
    """Weight of each class in the loss; (): 1 for all."""
    hard_threshold: float = 0.0
    """Online hard example mining (Shrivastava et al. 2016): train on pixels whose right class has a lower probability than
    this; 0: on all pixels."""
    hard_pixels: int = 131_072
    """Least number of pixels of a device that hard example mining keeps, the hardest ones."""

    def __post_init__(self):
        if not 0 <= self.hard_threshold <= 1:
            raise UserError(f"loss.hard_threshold is a probability, not {self.hard_threshold}")
        if self.hard_threshold and self.hard_pixels < 1:
            raise UserError(f"loss.hard_pixels must be at least 1, not {self.hard_pixels}")
        if self.class_weights and min(self.class_weights) < 0:
            raise UserError(f"loss.class_weights must not be negative, but are {self.class_weights}")

    def check(self, classes: int) -> None:
        """Raise UserError unless there is a weight for each class, or none at all."""
        if len(self.class_weights) not in (0, classes):
            raise UserError(
                f"loss.class_weights holds {len(self.class_weights)} numbers for {classes} classes: one for each, or ()"
            )

    def weights(self, labels: jax.Array) -> jax.Array:
        """The weight of each label, all below K; of the same shape."""
        if not self.class_weights:
            return jnp.ones(labels.shape)
        return jnp.asarray(np.asarray(self.class_weights, np.float32))[labels]

    def keep(self, nll_BHW: jax.Array, counts_BHW: jax.Array) -> jax.Array:
        """(B, H, W) bool: the pixels that count and are hard enough to train on."""
        counts_BHW = counts_BHW.astype(bool)
        if not self.hard_threshold:
            return counts_BHW
        probability = jnp.where(counts_BHW, jnp.exp(-jax.lax.stop_gradient(nll_BHW)), jnp.inf)
        place = jnp.clip(self.hard_pixels, 1, jnp.sum(counts_BHW)) - 1
        least = jnp.sort(probability.reshape(-1))[place]
        return (probability <= least) | (probability < self.hard_threshold)
