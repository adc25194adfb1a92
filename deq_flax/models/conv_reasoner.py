"""A convolutional model of puzzles with recall, after Bansal et al. 2022 (DT-Recall, arXiv:2202.05826).

Its cell sees a neighborhood, so that a puzzle of any size can be solved: information travels a few cells in each application of
f, and a larger puzzle takes more of them.

B batch, H height, W width (sequences: height 1), D features.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.models.reasoner import Reasoner, ReasonerOptions
from deq_flax.nn.convolution import convolve
from deq_flax.nn.linear import uniform_param, zeros_param
from deq_flax.nn.normalization import rms_norm


@dataclass(frozen=True, kw_only=True)
class ConvReasonerOptions(ReasonerOptions):
    """Options of a `ConvReasoner`.

    Raises:
      ValueError: a value is out of range.
    """

    name: str = "conv_reasoner"
    axes: int = 1
    """Axes of a puzzle: 1 for sequences, 2 for grids."""
    kernel: int = 3
    """Side of the convolutions' kernels; odd, unless causal."""
    blocks: int = 1
    """Residual blocks of two convolutions after the one that joins state and puzzle."""
    gated: bool = False
    """Hidden features are products, silu(a) b, not relu(a): a composition, as of permutations, is a sum of products."""
    causal: bool = False
    """A cell of a sequence sees itself and the cells before it alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or (self.kernel % 2 == 0 and not self.causal):
            raise ValueError(f"kernel must be odd, unless causal, got {self.kernel}")
        if self.axes not in (1, 2) or self.blocks < 0:
            raise ValueError(f"axes must be 1 or 2, and blocks at least 0, got {self.axes} and {self.blocks}")
        if self.causal and self.axes == 2:
            raise ValueError("causal is for sequences, axes=1: a grid has no cells that come before others")


class CellConv(nnx.Module):
    """A convolution with bias over one axis or two, of images (B, H, W, D); sequences have height 1.

    `causal` as in `convolve`.
    """

    def __init__(self, d_in: int, d_out: int, size: int, axes: int, *, causal: bool, rngs: nnx.Rngs):
        self.causal = causal
        self.kernel_HWIO = uniform_param(rngs.params(), (size if axes == 2 else 1, size, d_in, d_out))
        self.bias_O = zeros_param((d_out,))

    def __call__(self, x_BHWD: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """(B, H, W, I) -> (B, H, W, O); `dtype` as in `convolve`."""
        y_BHWO = convolve(x_BHWD, self.kernel_HWIO[...], dtype=dtype, causal=self.causal)
        return y_BHWO + self.bias_O[...].astype(y_BHWO.dtype)[None, None, None]


class ConvReasoner(Reasoner):
    """h = act(conv([z, x])), residual blocks h <- relu(h + conv(act(conv(h)))), then f(z, x) = norm(z + conv(h)).

    act(a) is relu(a) or, gated, silu(a) b, with b from as many more features of its convolution (SwiGLU, Shazeer 2020).

    Raises:
      ValueError: an option is out of range.
    """

    Options = ConvReasonerOptions

    def __init__(self, options: ConvReasonerOptions, *, rngs: nnx.Rngs):
        super().__init__(options, rngs=rngs)
        width, conv = options.width, partial(CellConv, size=options.kernel, axes=options.axes, causal=options.causal, rngs=rngs)
        inner = width * (2 if options.gated else 1)
        self.join = conv(2 * width, inner)
        self.blocks = nnx.List([conv(width, d_out) for d_out in [inner, width] * options.blocks])
        self.out = conv(width, width)

    def embed(self, inputs_BS: jax.Array) -> jax.Array:
        if inputs_BS.ndim - 1 != self.options.axes:
            raise ValueError(
                f"the puzzles have {inputs_BS.ndim - 1} axes, but model.axes is {self.options.axes}: set it to that"
            )
        return super().embed(inputs_BS)

    def evaluate(self, z: jax.Array, x_BSD: jax.Array) -> jax.Array:
        shape = z.shape
        z_BHWD, x_BHWD = (a.reshape(shape[0], -1, *shape[-2:]) for a in (z, x_BSD))
        h = self.activate(self.join(jnp.concatenate([z_BHWD, x_BHWD], axis=-1), self.dtype))
        for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            h = jax.nn.relu(h + second(self.activate(first(h, self.dtype)), self.dtype))
        return rms_norm(z_BHWD + self.out(h, self.dtype).astype(z.dtype)).reshape(shape)

    def activate(self, h: jax.Array) -> jax.Array:
        """The activation of a hidden convolution's features."""
        if not self.options.gated:
            return jax.nn.relu(h)
        a, b = jnp.split(h, 2, axis=-1)
        return jax.nn.silu(a) * b
