"""The multiscale DEQ for images (MDEQ; Bai et al. 2020, arXiv:2006.08656): classification and segmentation.

An image is injected into the finest of one to four branches, whose joint equilibrium z* = f(z*, image) is the state that a
head reads off. All images are (batch, height, width, channels).

B batch, H height, W width, C channels, K classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from deq_flax.models.mdeq_heads import ClassificationHead, SegmentationHead, resize_bilinear
from deq_flax.models.solve import solve
from deq_flax.nn.bottleneck import ConvBatchNorm
from deq_flax.nn.multiscale import MultiscaleCell
from deq_flax.nn.precision import compute_dtype, wide

HEADS = ("classification", "segmentation")


class MDEQEquation(NamedTuple):
    """z = f(z) of a batch of images."""

    f: Callable[[Any], Any]
    """A tuple of branches (B, H, W, C) -> one of the same shapes."""
    z0: tuple[jax.Array, ...]
    """Zeros."""


class MDEQOutput(NamedTuple):
    """What the model makes of a batch of images."""

    logits: jax.Array
    """(B, K), or (B, H, W, K) at the resolution of the images."""
    stats: Any
    """`SolverStats` of the forward solve."""
    jacobian_loss: jax.Array | None
    branches: tuple[jax.Array, ...]
    """The equilibrium."""


class Stem(nnx.Module):
    """What is injected: convolutions, the first `downsample` of them with stride 2, then a 1x1 one if `mix`."""

    def __init__(self, in_channels, channels, *, downsample, mix, momentum, dtype, rngs):
        options = dict(momentum=momentum, dtype=dtype, rngs=rngs)
        inputs = [in_channels] + [channels] * (max(downsample, 2) - 1)
        self.layers = nnx.List(
            [ConvBatchNorm(c, channels, 3, stride=2 if i < downsample else 1, **options) for i, c in enumerate(inputs)]
        )
        self.mix = ConvBatchNorm(channels, channels, 1, **options) if mix else None

    def __call__(self, images_BHWC, train):
        """(B, H, W, in_channels) -> (B, H', W', channels), in float32 or wider."""
        x = images_BHWC
        for layer in self.layers:
            x = layer(x, train)
        if self.mix is not None:
            x = self.mix(x, train)
        return wide(x)


class MDEQ(nnx.Module):
    """A stem, the equilibrium of a `MultiscaleCell`, and a head.

    Batch normalisation is in stem and head only, outside the solve. Its running statistics are `nnx.BatchStat` variables,
    which a call updates in training, once, and does not touch in evaluation.

    Args:
      num_classes: K.
      channels: of each of one to four branches; each has half the resolution of the one before, rounded up.
      head: 'classification', which needs head_channels and final_channels (see `ClassificationHead`), or 'segmentation',
        which needs last_kernel, 1 or 3.
      in_channels: of the images.
      downsample: how many times the stem halves the resolution.
      expansion, big_kernels, groups, fuse_norm_affine, weight_norm, fuse_weight_norm, dropout: see `MultiscaleCell`. The
        authors' first code has fuse_weight_norm 'post'; their later one 'all' for CIFAR and 'none' for ImageNet.
      norm_momentum: share of each batch in the running statistics.
      dtype: 'float32', or 'bfloat16' to compute convolutions in it; states and parameters stay float32.

    Raises:
      ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        num_classes,
        channels,
        head="classification",
        head_channels=(),
        final_channels=0,
        last_kernel=1,
        in_channels=3,
        downsample=0,
        expansion=5,
        big_kernels=(),
        groups=8,
        fuse_norm_affine=False,
        weight_norm=True,
        fuse_weight_norm="post",
        dropout=0.0,
        norm_momentum=0.1,
        dtype="float32",
        rngs,
    ):
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; known: {', '.join(HEADS)}")
        if downsample < 0 or num_classes < 1 or not 0 < norm_momentum <= 1:
            raise ValueError(
                "downsample must be at least 0, num_classes at least 1 and norm_momentum in (0, 1], "
                f"not {downsample}, {num_classes} and {norm_momentum}"
            )
        self.cell = MultiscaleCell(
            channels,
            expansion=expansion,
            big_kernels=big_kernels,
            groups=groups,
            fuse_norm_affine=fuse_norm_affine,
            weight_norm=weight_norm,
            fuse_weight_norm=fuse_weight_norm,
            dropout=dropout,
            dtype=dtype,
            rngs=rngs,
        )
        options = dict(momentum=norm_momentum, dtype=compute_dtype(dtype), rngs=rngs)
        mix = downsample > 0 or len(channels) > 2
        self.stem = Stem(in_channels, channels[0], downsample=downsample, mix=mix, **options)
        self.head: Any
        if head == "classification":
            sizes = dict(head_channels=head_channels, final_channels=final_channels)
            self.head = ClassificationHead(channels, num_classes, **sizes, **options)
        else:
            self.head = SegmentationHead(channels, num_classes, last_kernel=last_kernel, **options)

    def equation(self, images_BHWC, key=None, train=None):
        """The equation z = f(z) of a batch, with dropout masks drawn from `key`, if any, once and for all.

        `train` as in `__call__`.
        """
        injection_BHWC = self.stem(images_BHWC, _training(train, key))
        context = self.cell.context(injection_BHWC, self.cell.draw_masks(key, images_BHWC.shape[0]))
        return MDEQEquation(lambda z: self.cell.evaluate(z, context), self.cell.fresh_state(injection_BHWC))

    def __call__(
        self,
        images_BHWC,
        *,
        solver=None,
        gradient=None,
        key=None,
        train=None,
        max_steps=None,
        probe=None,
        jacobian_key=None,
        jacobian_through_equilibrium=False,
    ):
        """Logits of a batch of images, and the equilibrium behind them.

        Args:
          images_BHWC: normalised, floating.
          solver, gradient, max_steps, probe: as of `fixed_point`.
          key: draws the dropout masks; nothing is random without it.
          train: whether to normalise by the batch, and to update the running statistics; None: if there is a key.
          jacobian_key, jacobian_through_equilibrium: as of `models.solve.solve`.
        """
        f, z0 = self.equation(images_BHWC, key, train)
        solution, jacobian_loss = solve(
            f,
            z0,
            solver=solver,
            gradient=gradient,
            max_steps=max_steps,
            probe=probe,
            jacobian_key=jacobian_key,
            jacobian_through_equilibrium=jacobian_through_equilibrium,
        )
        z = solution.value
        logits = self.head(z, _training(train, key))
        if logits.ndim == 4:
            logits = resize_bilinear(logits, images_BHWC.shape[1:3])
        return MDEQOutput(logits=logits, stats=solution.stats, jacobian_loss=jacobian_loss, branches=z)


def _training(train, key):
    return key is not None if train is None else train
