"""The cell of a multiscale DEQ (Bai et al. 2020, arXiv:2006.08656, section 3.1): branches of halving resolution, fused.

A state is a tuple of branches, the finest first, each (B, H, W, C) with sizes of its own.
B batch, H height, W width, C channels, I and O input and output channels of a kernel.
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.nn.convolution import Conv, convolve
from deq_flax.nn.dropout import apply_mask, check_rate, draw_masks
from deq_flax.nn.image_norm import GroupNorm
from deq_flax.nn.precision import compute_dtype

FUSE_WEIGHT_NORM = {"none": (False, False), "post": (False, True), "all": (True, True)}
"""Whether weight normalisation holds the convolutions (between branches, after fusion) as it holds those of the blocks."""


class Context(NamedTuple):
    """Everything that stays constant while the cell is solved for."""

    injection_BHWC: jax.Array
    """Added in the first branch."""
    blocks: tuple
    """Of each branch its two kernels."""
    spread: tuple
    """Of each branch, as the source, (to finer, to coarser): kernels for all of these targets side by side, or None."""
    onward: tuple
    """[target][source]: the other kernels on the way to a target two or more levels coarser."""
    post: tuple
    masks_B11C: tuple
    """Dropout masks of the branches, already divided by the keep probability; None drops nothing."""


class Block(nnx.Module):
    """The residual block of one branch, two convolutions with `expansion` times the channels in between."""

    def __init__(self, channels, *, expansion, groups, n_big, weight_norm, dtype, rngs):
        inner = expansion * channels
        self.dtype = dtype
        self.conv1 = Conv(channels, inner, 5 if n_big > 0 else 3, weight_norm=weight_norm, rngs=rngs)
        self.norm1 = GroupNorm(inner, groups)
        self.conv2 = Conv(inner, channels, 5 if n_big > 1 else 3, weight_norm=weight_norm, rngs=rngs)
        self.norm2 = GroupNorm(channels, groups)
        self.norm3 = GroupNorm(channels, groups)

    def evaluate(self, z_BHWC, kernels, injection_BHWC=None, mask_B11C=None):
        """(B, H, W, C) -> (B, H, W, C), given `kernels` of the two convolutions."""
        inner = jax.nn.relu(self.norm1(convolve(z_BHWC, kernels[0], dtype=self.dtype)))
        x_BHWC = apply_mask(convolve(inner, kernels[1], dtype=self.dtype).astype(z_BHWC.dtype), mask_B11C)
        if injection_BHWC is not None:
            x_BHWC = x_BHWC + injection_BHWC
        return self.norm3(jax.nn.relu(self.norm2(x_BHWC) + z_BHWC))


class ConvNorm(nnx.Module):
    """A convolution and the group norm after it."""

    def __init__(self, c_in, c_out, size, *, stride=1, groups, affine=True, weight_norm, rngs):
        self.conv = Conv(c_in, c_out, size, stride=stride, weight_norm=weight_norm, rngs=rngs)
        self.norm = GroupNorm(c_out, groups, affine=affine)


class Downward(nnx.Module):
    """From a branch to one that is `levels` coarser: that many 3x3 convolutions of stride 2, ReLU between them."""

    def __init__(self, c_in, c_out, levels, *, groups, weight_norm, rngs):
        widths = [c_in] * levels + [c_out]
        options = dict(stride=2, groups=groups, weight_norm=weight_norm, rngs=rngs)
        self.layers = nnx.List([ConvNorm(a, b, 3, **options) for a, b in pairwise(widths)])


class MultiscaleCell(nnx.Module):
    """One residual block per branch, then every branch from all of them, then one more convolution each.

    Args:
      channels: of each branch; with one branch there is only its block.
      expansion: channels inside a block, as a multiple.
      big_kernels: for each branch how many of its block's two kernels are 5x5 instead of 3x3; () is none.
      groups: of the group norms; those after fusion have half as many.
      fuse_norm_affine: whether the group norm after fusion has scale and bias.
      weight_norm: of the blocks, and of what `fuse_weight_norm` names besides: 'none', 'post' or 'all'.
      dropout: rate at which a channel of a block's output is dropped, one mask a solve.

    Raises:
      ValueError: an option is out of range.
    """

    def __init__(
        self,
        channels,
        *,
        expansion=5,
        big_kernels=(),
        groups=8,
        fuse_norm_affine=False,
        weight_norm=True,
        fuse_weight_norm="post",
        dropout=0.0,
        dtype="float32",
        rngs,
    ):
        _check(channels, big_kernels, fuse_weight_norm)
        check_rate("dropout", dropout)
        self.channels, self.dropout, self.dtype = tuple(channels), dropout, compute_dtype(dtype)
        between, after = (weight_norm and held for held in FUSE_WEIGHT_NORM[fuse_weight_norm])
        block = dict(expansion=expansion, groups=groups, weight_norm=weight_norm, dtype=self.dtype, rngs=rngs)
        n_big = big_kernels or (0,) * len(channels)
        self.blocks = nnx.List([Block(c, n_big=n, **block) for c, n in zip(channels, n_big, strict=True)])
        if len(channels) == 1:
            return
        fuse = dict(groups=groups, weight_norm=between, rngs=rngs)
        self.fuse = nnx.List([nnx.List([_path(channels, i, j, **fuse) for j in self._branches]) for i in self._branches])
        post = dict(groups=max(groups // 2, 1), affine=fuse_norm_affine, weight_norm=after, rngs=rngs)
        self.post_fuse = nnx.List([ConvNorm(c, c, 1, **post) for c in channels])

    @property
    def _branches(self):
        return range(len(self.channels))

    def __call__(self, z, injection_BHWC, masks_B11C=None):
        """One evaluation. To evaluate more than once, make the context once and call `evaluate`."""
        return self.evaluate(z, self.context(injection_BHWC, masks_B11C))

    def fresh_state(self, injection_BHWC):
        """Zeros: the first branch of the size of the injection, each further one half the size, rounded up."""
        (batch_size, height, width, _), dtype = injection_BHWC.shape, injection_BHWC.dtype
        sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in self._branches]
        return tuple(jnp.zeros((batch_size, *size, c), dtype) for size, c in zip(sizes, self.channels, strict=True))

    def draw_masks(self, key, batch_size):
        """Dropout masks for one solve; none at all when key is None."""
        return tuple(draw_masks(key, *((self.dropout, (batch_size, 1, 1, c)) for c in self.channels)))

    def context(self, injection_BHWC, masks_B11C=None):
        """Compute once what every evaluation for this input shares. masks_B11C: from `draw_masks`, or None."""
        blocks = tuple((self._kernel(block.conv1), self._kernel(block.conv2)) for block in self.blocks)
        masks = masks_B11C or (None,) * len(self.channels)
        if len(self.channels) == 1:
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

    def evaluate(self, z, context):
        """f(z): a tuple of branches -> one of the same shapes and types."""
        injections = [context.injection_BHWC, *[None] * (len(self.channels) - 1)]
        parts = zip(self.blocks, z, context.blocks, injections, context.masks_B11C, strict=True)
        x = [block.evaluate(*part) for block, *part in parts]
        if len(x) == 1:
            return tuple(x)
        spread = [self._spread(x[j], j, context.spread[j]) for j in self._branches]
        return tuple(self._gather(x[i], [spread[j][i] for j in self._branches], i, context) for i in self._branches)

    def _spread(self, x_BHWC, j, kernels):
        """What the first convolution makes of branch j for each target; None for itself.

        One convolution for all finer targets and one for all coarser ones: fewer, larger ones are faster.
        """
        finer, coarser = kernels
        parts: list = [None] * len(self.channels)
        if finer is not None:
            widths = [self.channels[i] for i in range(j)]
            parts[:j] = _split(convolve(x_BHWC, finer, dtype=self.dtype), widths)
        if coarser is not None:
            widths = [self.fuse[i][j].layers[0].norm.channels for i in self._branches[j + 1 :]]
            parts[j + 1 :] = _split(convolve(x_BHWC, coarser, 2, dtype=self.dtype), widths)
        return parts

    def _gather(self, x_BHWC, parts, i, context):
        """The new branch i, of its own block's output and what the others sent it."""
        total = x_BHWC
        for j, part in enumerate(parts):
            if j > i:
                total = total + _enlarge(self.fuse[i][j].norm(part), total.shape)
            elif j < i:
                first, *layers = self.fuse[i][j].layers
                part = first.norm(part)
                for layer, kernel in zip(layers, context.onward[i][j], strict=True):
                    part = layer.norm(convolve(jax.nn.relu(part), kernel, 2, self.dtype))
                total = total + part.astype(total.dtype)
        fused = convolve(jax.nn.relu(total), context.post[i], dtype=self.dtype).astype(total.dtype)
        return self.post_fuse[i].norm(fused)

    def _kernel(self, conv):
        kernel_HWIO = conv.kernel()
        return kernel_HWIO if self.dtype is None else kernel_HWIO.astype(self.dtype)


def _check(channels, big_kernels, fuse_weight_norm):
    if not 1 <= len(channels) <= 4:
        raise ValueError(f"channels are of one to four branches, not {channels}")
    if big_kernels and (len(big_kernels) != len(channels) or not all(0 <= n <= 2 for n in big_kernels)):
        raise ValueError(f"big_kernels is a number from 0 to 2 for each branch, not {big_kernels}")
    if fuse_weight_norm not in FUSE_WEIGHT_NORM:
        raise ValueError(f"unknown fuse_weight_norm {fuse_weight_norm!r}; known: {', '.join(FUSE_WEIGHT_NORM)}")


def _path(channels, i, j, *, groups, weight_norm, rngs):
    """The layers from branch j to branch i; None for i = j."""
    if j == i:
        return None
    if j > i:
        return ConvNorm(channels[j], channels[i], 1, groups=groups, weight_norm=weight_norm, rngs=rngs)
    return Downward(channels[j], channels[i], i - j, groups=groups, weight_norm=weight_norm, rngs=rngs)


def _side_by_side(kernels_HWIO):
    return jnp.concatenate(kernels_HWIO, axis=-1) if kernels_HWIO else None


def _split(x_BHWC, widths):
    ends = [sum(widths[: k + 1]) for k in range(len(widths) - 1)]
    return jnp.split(x_BHWC, ends, axis=-1)


def _enlarge(x_BHWC, shape):
    """Nearest-neighbour enlargement by a power of two to the height and width of `shape`, cutting what is too much."""
    (batch_size, height, width, channels), (_, new_height, new_width, _) = x_BHWC.shape, shape
    factor = 1
    while height * factor < new_height or width * factor < new_width:
        factor *= 2
    x = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (batch_size, height, factor, width, factor, channels))
    return x.reshape(batch_size, height * factor, width * factor, channels)[:, :new_height, :new_width]
