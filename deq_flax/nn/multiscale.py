"""The cell of a multiscale DEQ (Bai et al. 2020, arXiv:2006.08656, section 3.1): fused branches of different resolution.

A state is a tuple of branches, the finest first, each (B, H, W, C) with its own H, W and C; each has half the resolution of the
one before, rounded up. B batch, H height, W width, C channels, I and O input and output channels of a kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deq_flax.nn.convolution import Conv, convolve
from deq_flax.nn.dropout import apply_mask, check_rate, draw_masks
from deq_flax.nn.normalization import GroupNorm
from deq_flax.nn.precision import compute_dtype
from deq_flax.nn.resize import enlarge_nearest

FUSE_WEIGHT_NORM = {"none": (False, False), "post": (False, True), "all": (True, True)}
"""Weight normalization of the convolutions (between branches, after fusion), given that those of the blocks have it."""

State = tuple[jax.Array, ...]
"""The branches (B, H, W, C), the finest first."""


@dataclass(frozen=True, kw_only=True)
class MultiscaleOptions:
    """Options of a `MultiscaleCell`.

    Raises:
      ValueError: a value is out of range.
    """

    channels: tuple[int, ...]
    """Channels of each of one to four branches, the finest first; each branch has half the resolution of the one before."""
    expansion: int = 5
    """Inner channels of a branch's residual block, as a multiple of its channels."""
    big_kernels: tuple[int, ...] = ()
    """Number of 5x5 kernels, 0 to 2, among the two of each branch's block, instead of 3x3; (): none."""
    groups: int = 8
    """Groups of the group norms; those after fusion have half as many."""
    fuse_norm_affine: bool = False
    """Give the group norms after fusion a scale and a bias."""
    weight_norm: bool = True
    """Weight normalization of the kernels of the blocks, and of those that fuse_weight_norm names."""
    fuse_weight_norm: Literal["none", "post", "all"] = "post"
    """Other kernels with weight normalization: none; post, those after fusion, as in the authors' first code; all, those
    between branches too, as in their later code for CIFAR-10."""
    dropout: float = 0.0
    """Dropout rate of the channels of a block's output; one mask per solve."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the convolutions: float32 or bfloat16. Parameters and the solver's state are float32 in both."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "big_kernels", tuple(self.big_kernels))
        channels, big_kernels = self.channels, self.big_kernels
        if not 1 <= len(channels) <= 4:
            raise ValueError(f"channels are of one to four branches, not {channels}")
        if big_kernels and (len(big_kernels) != len(channels) or not all(0 <= n <= 2 for n in big_kernels)):
            raise ValueError(f"big_kernels is a number from 0 to 2 for each branch, not {big_kernels}")
        if self.fuse_weight_norm not in FUSE_WEIGHT_NORM:
            raise ValueError(f"unknown fuse_weight_norm {self.fuse_weight_norm!r}; known: {', '.join(FUSE_WEIGHT_NORM)}")
        check_rate("dropout", self.dropout)
        compute_dtype(self.dtype)


class Context(NamedTuple):
    """The constants of one solve: everything in f that does not depend on z."""

    injection_BHWC: jax.Array
    """Added in the block of the first branch."""
    blocks: tuple[tuple[jax.Array, jax.Array], ...]
    """The two kernels of each branch's block."""
    spread: tuple[tuple[jax.Array | None, jax.Array | None], ...]
    """Kernels of each source branch (to finer targets, to coarser ones), all targets side by side; None: no targets."""
    onward: tuple[tuple[tuple[jax.Array, ...], ...], ...]
    """[target][source]: the remaining kernels on the way to a target that is two or more levels coarser."""
    post: tuple[jax.Array, ...]
    """The kernel after fusion, for each branch."""
    masks_B11C: tuple[jax.Array | None, ...]
    """Dropout masks of the branches, divided by the probability of keeping an entry; None drops nothing."""


class Block(nnx.Module):
    """The residual block of one branch: two convolutions, with `expansion` times the channels in between.

    Args:
      n_big: number of 5x5 kernels among the two, instead of 3x3.
      dtype: as in `convolve`.
    """

    def __init__(
        self,
        channels: int,
        *,
        expansion: int,
        groups: int,
        n_big: int,
        weight_norm: bool,
        dtype: DTypeLike | None,
        rngs: nnx.Rngs,
    ):
        inner = expansion * channels
        self.dtype = dtype
        self.conv1 = Conv(channels, inner, 5 if n_big > 0 else 3, weight_norm=weight_norm, rngs=rngs)
        self.norm1 = GroupNorm(inner, groups)
        self.conv2 = Conv(inner, channels, 5 if n_big > 1 else 3, weight_norm=weight_norm, rngs=rngs)
        self.norm2 = GroupNorm(channels, groups)
        self.norm3 = GroupNorm(channels, groups)

    def evaluate(
        self,
        z_BHWC: jax.Array,
        kernels: tuple[jax.Array, jax.Array],
        injection_BHWC: jax.Array | None = None,
        mask_B11C: jax.Array | None = None,
    ) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C), given the kernels of the two convolutions."""
        inner = jax.nn.relu(self.norm1(convolve(z_BHWC, kernels[0], dtype=self.dtype)))
        x_BHWC = apply_mask(convolve(inner, kernels[1], dtype=self.dtype).astype(z_BHWC.dtype), mask_B11C)
        if injection_BHWC is not None:
            x_BHWC = x_BHWC + injection_BHWC
        return self.norm3(jax.nn.relu(self.norm2(x_BHWC) + z_BHWC))


class ConvNorm(nnx.Module):
    """A convolution followed by group normalization: a container, applied by `MultiscaleCell`."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        stride: int = 1,
        groups: int,
        affine: bool = True,
        weight_norm: bool,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(c_in, c_out, size, stride=stride, weight_norm=weight_norm, rngs=rngs)
        self.norm = GroupNorm(c_out, groups, affine=affine)


class Downward(nnx.Module):
    """The path to a branch that is `levels` coarser: as many 3x3 convolutions of stride 2, with ReLU between them."""

    def __init__(self, c_in: int, c_out: int, levels: int, *, groups: int, weight_norm: bool, rngs: nnx.Rngs):
        widths = [c_in] * levels + [c_out]
        self.layers = nnx.List(
            [ConvNorm(a, b, 3, stride=2, groups=groups, weight_norm=weight_norm, rngs=rngs) for a, b in pairwise(widths)]
        )


class MultiscaleCell(nnx.Module):
    """The map f of a multiscale DEQ: a residual block for each branch, the fusion of all branches into each, a 1x1 convolution.

    With one branch there is only its block.

    Weights are normalized, and masks drawn, once per solve: `context` prepares what all evaluations share, `evaluate` is f.

    Raises:
      ValueError: the channels cannot be divided into that many groups.
    """

    def __init__(self, options: MultiscaleOptions, *, rngs: nnx.Rngs):
        self.options = options
        self.dtype = compute_dtype(options.dtype)
        channels, groups, weight_norm = options.channels, options.groups, options.weight_norm
        between, after = (weight_norm and normalized for normalized in FUSE_WEIGHT_NORM[options.fuse_weight_norm])
        self.blocks = nnx.List(
            [
                Block(
                    c,
                    expansion=options.expansion,
                    groups=groups,
                    n_big=n_big,
                    weight_norm=weight_norm,
                    dtype=self.dtype,
                    rngs=rngs,
                )
                for c, n_big in zip(channels, options.big_kernels or (0,) * len(channels), strict=True)
            ]
        )
        if len(channels) == 1:
            return

        def path(i: int, j: int) -> ConvNorm | Downward | None:
            """The layers from branch j to branch i; None for i = j."""
            if j == i:
                return None
            if j > i:
                return ConvNorm(channels[j], channels[i], 1, groups=groups, weight_norm=between, rngs=rngs)
            return Downward(channels[j], channels[i], i - j, groups=groups, weight_norm=between, rngs=rngs)

        self.fuse: nnx.List[Any] = nnx.List([nnx.List([path(i, j) for j in self._branches]) for i in self._branches])
        affine, half = options.fuse_norm_affine, max(groups // 2, 1)
        self.post_fuse = nnx.List(
            [ConvNorm(c, c, 1, groups=half, affine=affine, weight_norm=after, rngs=rngs) for c in channels]
        )

    @property
    def _branches(self) -> range:
        return range(len(self.options.channels))

    def __call__(self, z: State, injection_BHWC: jax.Array, masks_B11C: Sequence[jax.Array | None] | None = None) -> State:
        """f(z) for a given injection. For several evaluations, use `context` once and `evaluate`."""
        return self.evaluate(z, self.context(injection_BHWC, masks_B11C))

    def fresh_state(self, injection_BHWC: jax.Array) -> State:
        """A state of zeros: the first branch of the injection's size, each further one half the size, rounded up."""
        (batch_size, height, width, _), dtype = injection_BHWC.shape, injection_BHWC.dtype
        sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in self._branches]
        return tuple(jnp.zeros((batch_size, *size, c), dtype) for size, c in zip(sizes, self.options.channels, strict=True))

    def draw_masks(self, key: jax.Array | None, batch_size: int) -> tuple[jax.Array | None, ...]:
        """The dropout masks (B, 1, 1, C) of one solve; without a key nothing is dropped."""
        return tuple(draw_masks(key, *((self.options.dropout, (batch_size, 1, 1, c)) for c in self.options.channels)))

    def context(self, injection_BHWC: jax.Array, masks_B11C: Sequence[jax.Array | None] | None = None) -> Context:
        """Compute the constants of one solve.

        Args:
          injection_BHWC: added in the block of the first branch; its channels are that branch's.
          masks_B11C: from `draw_masks`.
        """
        blocks = tuple((self._kernel(block.conv1), self._kernel(block.conv2)) for block in self.blocks)
        masks = tuple(masks_B11C or [None] * len(blocks))
        if len(blocks) == 1:
            return Context(injection_BHWC, blocks, (), (), (), masks)
        finer = [[self._kernel(self.fuse[i][j].conv) for i in range(j)] for j in self._branches]
        coarser = [[self._kernel(self.fuse[i][j].layers[0].conv) for i in self._branches[j + 1 :]] for j in self._branches]
        return Context(
            injection_BHWC=injection_BHWC,
            blocks=blocks,
            spread=tuple((_side_by_side(a), _side_by_side(b)) for a, b in zip(finer, coarser, strict=True)),
            onward=tuple(
                tuple(tuple(self._kernel(layer.conv) for layer in self.fuse[i][j].layers[1:]) for j in range(i))
                for i in self._branches
            ),
            post=tuple(self._kernel(layer.conv) for layer in self.post_fuse),
            masks_B11C=masks,
        )

    def evaluate(self, z: State, context: Context) -> State:
        """f(z), with the shapes and types of z."""
        injections = [context.injection_BHWC, *[None] * (len(z) - 1)]
        parts = zip(self.blocks, z, context.blocks, injections, context.masks_B11C, strict=True)
        x = [block.evaluate(branch, kernels, injection, mask) for block, branch, kernels, injection, mask in parts]
        if len(x) == 1:
            return tuple(x)
        spread = [self._spread(x[j], j, context.spread[j]) for j in self._branches]
        return tuple(self._gather(x[i], [spread[j][i] for j in self._branches], i, context) for i in self._branches)

    def _spread(self, x_BHWC: jax.Array, j: int, kernels: tuple[jax.Array | None, jax.Array | None]) -> list[jax.Array | None]:
        """The result of the first convolution from branch j to each target; None for j itself.

        One convolution serves all finer targets and one all coarser targets: fewer, larger ones are faster.
        """
        finer, coarser = kernels
        parts: list[jax.Array | None] = [None] * len(self.options.channels)
        if finer is not None:
            widths = [self.options.channels[i] for i in range(j)]
            parts[:j] = _split(convolve(x_BHWC, finer, dtype=self.dtype), widths)
        if coarser is not None:
            widths = [self.fuse[i][j].layers[0].norm.channels for i in self._branches[j + 1 :]]
            parts[j + 1 :] = _split(convolve(x_BHWC, coarser, 2, dtype=self.dtype), widths)
        return parts

    def _gather(self, x_BHWC: jax.Array, parts: Sequence[jax.Array | None], i: int, context: Context) -> jax.Array:
        """The new branch i, from its block's output and the parts that `_spread` gave for it."""
        total = x_BHWC
        for j, part in enumerate(parts):
            if part is None:
                continue
            if j > i:
                total = total + enlarge_nearest(self.fuse[i][j].norm(part), total.shape[1:3])
            else:
                first, *layers = self.fuse[i][j].layers
                part = first.norm(part)
                for layer, kernel in zip(layers, context.onward[i][j], strict=True):
                    part = layer.norm(convolve(jax.nn.relu(part), kernel, 2, self.dtype))
                total = total + part.astype(total.dtype)
        fused = convolve(jax.nn.relu(total), context.post[i], dtype=self.dtype).astype(total.dtype)
        return self.post_fuse[i].norm(fused)

    def _kernel(self, conv: Conv) -> jax.Array:
        kernel_HWIO = conv.kernel()
        return kernel_HWIO if self.dtype is None else kernel_HWIO.astype(self.dtype)


def _side_by_side(kernels_HWIO: Sequence[jax.Array]) -> jax.Array | None:
    return jnp.concatenate(kernels_HWIO, axis=-1) if kernels_HWIO else None


def _split(x_BHWC: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """Split the channels into parts of the given widths."""
    ends = [sum(widths[: k + 1]) for k in range(len(widths) - 1)]
    return jnp.split(x_BHWC, ends, axis=-1)
