"""A Transformer-XL block with injected attention input: the cell of the DEQ-Transformer.

B batch, L length, M memory, K keys (M + L), D model features, H heads, E features of a head, R relative keys (1 + K),
F inner features, J features of an injection (3 H E: queries, keys, values, each head by head).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.nn.attention import attention_mask, mask_to_bias, relative_attention
from deq_flax.nn.dropout import apply_mask, check_rate, draw_masks
from deq_flax.nn.linear import Linear, normal_param
from deq_flax.nn.norm import LayerNorm, layer_norm
from deq_flax.nn.precision import compute_dtype, contract, contract_narrow


class Memory(NamedTuple):
    """Transformer-XL memory: what the attention of the next segment sees of earlier ones. Right-aligned, of fixed size."""

    states_BMD: jax.Array
    """Equilibrium states."""
    injections_BMJ: jax.Array
    """Input injections at the same positions."""
    length_B: jax.Array
    """int32, how many of the last entries are valid; the others are masked."""


class Masks(NamedTuple):
    """Dropout masks of one solve, already divided by the keep probability; None drops nothing."""

    positions_1D: jax.Array | None = None
    probabilities_HBLK: jax.Array | None = None
    attended_B1D: jax.Array | None = None
    inner_B1F: jax.Array | None = None
    output_B1D: jax.Array | None = None


class Context(NamedTuple):
    """Everything that stays constant while the cell is solved for."""

    qkv_D3HE: jax.Array
    injection_3HBLE: jax.Array
    """Of the queries includes the content bias. The queries' third, here and in the kernel, is divided by sqrt(E)."""
    position_minus_content_H1E: jax.Array
    memory_kv_2HBME: jax.Array | None
    relative_keys_HRE: jax.Array
    bias_1BLK: jax.Array
    out_HED: jax.Array
    inner_DF: jax.Array
    outer_FD: jax.Array
    masks: Masks


class TransformerCell(nnx.Module):
    """One Transformer-XL block whose attention input is injected: what the equilibrium is an equilibrium of.

    `pre_norm`: normalise the inputs of attention and feed-forward instead of their sums with the residuals; the residual of
    the feed-forward is then its *normalised* input, without which no equilibrium is stable.

    `affine_norm`, only with `pre_norm`: the block of TorchDEQ's language model (Geng and Kolter 2023, arXiv:2310.18605), which
    is unrolled a few times rather than solved for. Norms have parameters, another one follows the attention, residuals are raw,
    and kernels start at N(0, 0.01^2) under weight norm too.

    Raises:
      ValueError: `affine_norm` without `pre_norm`, a negative span, or a rate outside [0, 1).
    """

    def __init__(
        self,
        d_model,
        *,
        n_head,
        d_head,
        d_inner,
        pre_norm=False,
        affine_norm=False,
        weight_norm=True,
        local_size=0,
        dropout=0.0,
        attention_dropout=0.0,
        dtype="float32",
        rngs,
    ):
        if local_size < 0:
            raise ValueError(f"local_size must not be negative, got {local_size}")
        if affine_norm and not pre_norm:
            raise ValueError("affine_norm is for pre_norm only: set pre_norm too")
        check_rate("dropout", dropout)
        check_rate("attention_dropout", attention_dropout)
        self.d_model, self.n_head, self.d_head, self.d_inner = d_model, n_head, d_head, d_inner
        self.pre_norm, self.local_size = pre_norm, local_size
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.dtype = compute_dtype(dtype)
        width, options = n_head * d_head, {"weight_norm": weight_norm, "uniform": not affine_norm, "rngs": rngs}
        self.qkv = Linear(d_model, 3 * width, use_bias=False, **options)
        self.relative = Linear(d_model, width, use_bias=False, **options)
        self.out = Linear(width, d_model, **options)
        self.content_bias_HE = normal_param(rngs.params(), (n_head, d_head), 0.01)
        self.position_bias_HE = normal_param(rngs.params(), (n_head, d_head), 0.01)
        self.inner = Linear(d_model, d_inner, **options)
        self.outer = Linear(d_inner, d_model, **options)
        self.norm_before = LayerNorm(d_model, rngs=rngs) if affine_norm else None
        self.norm_attended = LayerNorm(width, rngs=rngs) if affine_norm else None
        self.norm_inner = LayerNorm(d_model, rngs=rngs) if affine_norm else None

    def __call__(self, z_BLD, injection_BLJ, memory, positions_KD, masks=None):
        """One evaluation. To evaluate more than once, make the context once and call `evaluate`."""
        return self.evaluate(z_BLD, self.context(injection_BLJ, memory, positions_KD, masks))

    def draw_masks(self, key, batch_size, length, n_memory):
        """Dropout masks for one solve; none at all when key is None."""
        features, keys = (batch_size, 1, self.d_model), n_memory + length
        return Masks(
            *draw_masks(
                key,
                (self.dropout, (1, self.d_model)),
                (self.attention_dropout, (self.n_head, batch_size, length, keys)),
                (self.dropout, features),
                (self.dropout, (batch_size, 1, self.d_inner)),
                (self.dropout, features),
            )
        )

    def context(self, injection_BLJ, memory, positions_KD, masks=None):
        """Compute once what every evaluation for these inputs shares.

        injection_BLJ, and the memory's: of size 1 along B and L, where it is the same everywhere. positions_KD:
        `position_encoding` of memory and segment together, K = M + L. masks: from `draw_masks`, or None.
        """
        masks = masks or Masks()
        n_memory, dtype = memory.states_BMD.shape[1], injection_BLJ.dtype
        length = positions_KD.shape[0] - n_memory
        kernel_D3HE = self.qkv.kernel().reshape(self.d_model, 3, self.n_head, self.d_head)
        content_HE, position_HE = self.content_bias_HE[...], self.position_bias_HE[...]
        scale = self.d_head**-0.5
        scale_3 = jnp.array([scale, 1, 1], dtype)
        injection_3HBLE = self._split(injection_BLJ).at[0].add(content_HE[:, None, None])
        return Context(
            qkv_D3HE=self._narrow(kernel_D3HE * scale_3[None, :, None, None]),
            injection_3HBLE=injection_3HBLE * scale_3[:, None, None, None, None],
            position_minus_content_H1E=((position_HE - content_HE) * scale)[:, None],
            memory_kv_2HBME=self._memory_keys_values(memory, kernel_D3HE) if n_memory else None,
            relative_keys_HRE=self._relative_keys(apply_mask(positions_KD, masks.positions_1D)),
            bias_1BLK=mask_to_bias(attention_mask(length, n_memory, memory.length_B, self.local_size), dtype),
            out_HED=self._narrow(self.out.kernel().reshape(self.n_head, self.d_head, self.d_model)),
            inner_DF=self._narrow(self.inner.kernel()),
            outer_FD=self._narrow(self.outer.kernel()),
            masks=masks,
        )

    def evaluate(self, z_BLD, context):
        """f(z): (B, L, D) -> (B, L, D), causal along L. The type of z is kept, whatever type is computed in."""
        attended_BLD = apply_mask(self._attend(z_BLD, context), context.masks.attended_B1D)
        sum_BLD = z_BLD + attended_BLD
        # Pre-norm too: what the feed-forward sees, and its residual unless norms are affine, is the normalised sum.
        x_BLD = layer_norm(sum_BLD) if self.norm_inner is None else self.norm_inner(sum_BLD)
        residual_BLD = x_BLD if self.norm_inner is None else sum_BLD
        inner_BLF = contract_narrow("bld,df->blf", x_BLD, context.inner_DF, self.dtype)
        inner_BLF = jax.nn.relu(inner_BLF + self.inner.bias_O[...].astype(inner_BLF.dtype)[None, None])
        inner_BLF = apply_mask(inner_BLF, context.masks.inner_B1F)
        outer_BLD = contract("blf,fd->bld", inner_BLF, context.outer_FD, self.dtype) + self.outer.bias_O[...][None, None]
        sum_BLD = residual_BLD + apply_mask(outer_BLD, context.masks.output_B1D)
        return (sum_BLD if self.pre_norm else layer_norm(sum_BLD)).astype(z_BLD.dtype)

    def _attend(self, z_BLD, context):
        x_BLD = self._normalised(z_BLD)
        heads_3HBLE = contract("bld,dnhe->nhble", x_BLD, context.qkv_D3HE, self.dtype) + context.injection_3HBLE
        content_HBLE, k_HBKE, v_HBKE = heads_3HBLE
        if context.memory_kv_2HBME is not None:
            memory_k_HBME, memory_v_HBME = context.memory_kv_2HBME
            k_HBKE = jnp.concatenate([memory_k_HBME, k_HBKE], axis=2)
            v_HBKE = jnp.concatenate([memory_v_HBME, v_HBKE], axis=2)
        attended_BLHE = relative_attention(
            content_HBLE,
            content_HBLE + context.position_minus_content_H1E[:, None],
            k_HBKE,
            v_HBKE,
            context.relative_keys_HRE,
            context.bias_1BLK,
            probability_mask=context.masks.probabilities_HBLK,
            dtype=self.dtype,
        )
        if self.norm_attended is not None:
            attended_BLHE = self.norm_attended(attended_BLHE.reshape(*z_BLD.shape[:2], -1)).reshape(attended_BLHE.shape)
        return contract("blhe,hed->bld", attended_BLHE, context.out_HED, self.dtype) + self.out.bias_O[...][None, None]

    def _memory_keys_values(self, memory, kernel_D3HE):
        projected_2HBME = contract("bmd,dnhe->nhbme", self._normalised(memory.states_BMD), kernel_D3HE[:, 1:], self.dtype)
        return projected_2HBME + self._split(memory.injections_BMJ)[1:]

    def _normalised(self, x_BLD):
        """What attention sees of a state."""
        if self.norm_before is not None:
            return self.norm_before(x_BLD)
        return layer_norm(x_BLD) if self.pre_norm else x_BLD

    def _relative_keys(self, positions_KD):
        keys_KJ = self.relative(positions_KD, self.dtype).reshape(-1, self.n_head, self.d_head)
        return self._narrow(jnp.pad(keys_KJ.transpose(1, 0, 2), ((0, 0), (1, 0), (0, 0))))

    def _split(self, injection_BLJ):
        """(B, L, 3 H E) -> (3, H, B, L, E)."""
        return injection_BLJ.reshape(*injection_BLJ.shape[:2], 3, self.n_head, self.d_head).transpose(2, 3, 0, 1, 4)

    def _narrow(self, kernel):
        return kernel if self.dtype is None else kernel.astype(self.dtype)


class TransformerStack(nnx.Module):
    """Several blocks one after the other as one cell. All have the same injection and memory, each weights of its own.

    Args:
      blocks: how many; the other arguments are `TransformerCell`'s.
    """

    def __init__(self, d_model, *, blocks, rngs, **options):
        self.blocks = nnx.List([TransformerCell(d_model, **options, rngs=rngs) for _ in range(blocks)])

    def draw_masks(self, key, batch_size, length, n_memory):
        """As `TransformerCell.draw_masks`, for each block; the mask of the positions is the same for all."""
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        masks = [block.draw_masks(k, batch_size, length, n_memory) for block, k in zip(self.blocks, keys, strict=True)]
        return tuple(mask._replace(positions_1D=masks[0].positions_1D) for mask in masks)

    def context(self, injection_BLJ, memory, positions_KD, masks=None):
        """As `TransformerCell.context`, for each block."""
        masks = masks or (None,) * len(self.blocks)
        return tuple(
            block.context(injection_BLJ, memory, positions_KD, mask) for block, mask in zip(self.blocks, masks, strict=True)
        )

    def evaluate(self, z_BLD, context):
        """(B, L, D) -> (B, L, D) through all blocks."""
        for block, own in zip(self.blocks, context, strict=True):
            z_BLD = block.evaluate(z_BLD, own)
        return z_BLD
