"""The multiscale DEQ for images (MDEQ; Bai et al. 2020, arXiv:2006.08656): classification and segmentation.

The image is injected into the finest of one to four branches. A head computes the logits from their joint equilibrium
z* = f(z*, image).

B batch, H height, W width, C channels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike

from deq_flax.equilibrium import fixed_point
from deq_flax.equilibrium.solution import Solve
from deq_flax.models.mdeq_heads import ClassificationHead, SegmentationHead
from deq_flax.models.model import ImageModel, ImageOutput, ModelOptions
from deq_flax.nn.convolution import ConvBatchNorm
from deq_flax.nn.multiscale import MultiscaleCell, MultiscaleOptions, State
from deq_flax.nn.precision import wide
from deq_flax.nn.resize import resize_bilinear

HEADS = ("classification", "segmentation")


@dataclass(frozen=True, kw_only=True)
class MDEQOptions(MultiscaleOptions, ModelOptions):
    """Options of an MDEQ.

    Raises:
      ValueError: a value is out of range.
    """

    name: str = "mdeq"
    num_classes: int
    """Number of classes."""
    head: Literal["classification", "segmentation"] = "classification"
    """Kind of output: classification, one class per image, or segmentation, one class per pixel."""
    head_channels: tuple[int, ...] = ()
    """Inner channels of the classification head's bottleneck for each branch; four times as many leave it."""
    final_channels: int = 0
    """Channels before the classification head's linear layer."""
    last_kernel: int = 1
    """Size of the segmentation head's last convolution: 1 or 3."""
    in_channels: int = 3
    """Channels of the images."""
    downsample: int = 0
    """Times the stem halves the resolution before the first branch."""
    norm_momentum: float = 0.1
    """Share of each batch in the running statistics of batch normalization, in (0, 1]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_channels", tuple(self.head_channels))
        super().__post_init__()
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}; known: {', '.join(HEADS)}")
        if self.downsample < 0 or self.num_classes < 1 or not 0 < self.norm_momentum <= 1:
            raise ValueError(
                "downsample must be at least 0, num_classes at least 1 and norm_momentum in (0, 1], "
                f"not {self.downsample}, {self.num_classes} and {self.norm_momentum}"
            )


class Equation(NamedTuple):
    """The equation z = f(z) of a batch of images."""

    f: Callable[..., State]
    """(z, injection) -> z; without an injection, with this one."""
    z0: State
    """Zeros."""
    injection_BHWC: jax.Array


class Stem(nnx.Module):
    """The network that computes the injection: 3x3 convolutions, `downsample` of them with stride 2, and a 1x1 one if `mix`."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        downsample: int,
        mix: bool,
        momentum: float,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        inputs = [in_channels] + [channels] * (max(downsample, 2) - 1)
        strides = [2 if i < downsample else 1 for i in range(len(inputs))]
        self.layers = nnx.List(
            [
                ConvBatchNorm(c, channels, 3, stride=stride, momentum=momentum, dtype=dtype, rngs=rngs)
                for c, stride in zip(inputs, strides, strict=True)
            ]
        )
        self.mix = ConvBatchNorm(channels, channels, 1, momentum=momentum, dtype=dtype, rngs=rngs) if mix else None

    def __call__(self, images_BHWC: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, in_channels) -> (B, H', W', channels), in float32 or wider; `train` as in `BatchNorm`."""
        x = images_BHWC
        for layer in self.layers:
            x = layer(x, train)
        if self.mix is not None:
            x = self.mix(x, train)
        return wide(x)


class MDEQ(ImageModel):
    """A stem, the equilibrium of a `MultiscaleCell`, and a head.

    Batch normalization is only in stem and head, outside the solve. Its running statistics are `nnx.BatchStat` variables, which
    a call updates once in training and leaves unchanged in evaluation.

    Raises:
      ValueError: an option is out of range.
    """

    Options = MDEQOptions
    has_equilibrium = True

    def __init__(self, options: MDEQOptions, *, rngs: nnx.Rngs):
        self.options = options
        channels, momentum = options.channels, options.norm_momentum
        self.cell = MultiscaleCell(options, rngs=rngs)
        dtype = self.cell.dtype
        self.stem = Stem(
            options.in_channels,
            channels[0],
            downsample=options.downsample,
            mix=options.downsample > 0 or len(channels) > 2,
            momentum=momentum,
            dtype=dtype,
            rngs=rngs,
        )
        self.head: ClassificationHead | SegmentationHead
        if options.head == "classification":
            self.head = ClassificationHead(
                channels,
                options.num_classes,
                head_channels=options.head_channels,
                final_channels=options.final_channels,
                momentum=momentum,
                dtype=dtype,
                rngs=rngs,
            )
        else:
            self.head = SegmentationHead(
                channels,
                options.num_classes,
                last_kernel=options.last_kernel,
                momentum=momentum,
                dtype=dtype,
                rngs=rngs,
            )

    def equation(self, images_BHWC: jax.Array, key: jax.Array | None = None) -> Equation:
        """The equation of a batch; given a key, that of training, with dropout masks that are the same in every evaluation."""
        injection_BHWC = self.stem(images_BHWC, key is not None)
        context = self.cell.context(injection_BHWC, self.cell.draw_masks(key, images_BHWC.shape[0]))

        def f(z: State, injection_BHWC: jax.Array = injection_BHWC) -> State:
            return self.cell.evaluate(z, context._replace(injection_BHWC=injection_BHWC))

        return Equation(f, self.cell.fresh_state(injection_BHWC), injection_BHWC)

    def __call__(self, images_BHWC: jax.Array, *, solve: Solve | None = None, key: jax.Array | None = None) -> ImageOutput:
        f, z0, injection_BHWC = self.equation(images_BHWC, key)
        solution, jacobian_loss = (fixed_point(f, z0), None) if solve is None else solve(f, z0, injection_BHWC)
        logits = self.head(solution.value, key is not None)
        if logits.ndim == 4:
            logits = resize_bilinear(logits, images_BHWC.shape[1:3])
        return ImageOutput(logits=logits, stats=solution.stats, jacobian_loss=jacobian_loss, branches=solution.value)
