"""A Transformer-XL block with injected attention input: the cell of the DEQ-Transformer.

B batch, L length, M memory, K keys (M + L), D model features, H heads, E features of a head, R relative keys (1 + K),
F inner features, J features of an injection (3 H E: queries, keys, values, each head by head).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.nn.attention import attention, attention_mask, mask_to_bias, relative_attention
from deq_flax.nn.dropout import apply_mask, check_rate, draw_masks
from deq_flax.nn.linear import Linear, Split, normal_param, whole
from deq_flax.nn.normalization import LayerNorm, RMSNorm, layer_norm, rms_norm
from deq_flax.nn.precision import compute_dtype, contract, contract_narrow
from deq_flax.nn.rotary import rotary_angles, rotate


@dataclass(frozen=True, kw_only=True)
class CellOptions:
    """Options of a Transformer block.

    Raises:
      ValueError: a value is out of range.
    """

    d_model: int
    """Features of a hidden state."""
    n_head: int
    """Attention heads."""
    d_head: int
    """Features of an attention head."""
    d_inner: int
    """Inner features of the feed-forward layer."""
    pre_norm: bool = False
    """Normalize the inputs of attention and feed-forward instead of their sums with the residuals."""
    affine_norm: bool = False
    """With pre_norm: give the norms a scale and a bias, add one after the attention, and leave the residuals unnormalized."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalization: layer, to zero mean and unit variance, or rms, by the root mean square alone and without a bias."""
    positions: Literal["relative", "rotary"] = "relative"
    """Positions in attention: relative, as in the Transformer-XL, or rotary (Su et al. 2021), which have no parameters."""
    gated: bool = False
    """SwiGLU (Shazeer 2020) instead of ReLU in the feed-forward layer, with a third kernel of d_inner features."""
    weight_norm: bool = True
    """Weight normalization of the kernels of attention and feed-forward."""
    local_size: int = 0
    """Attention span in tokens; 0 stands for 1000."""
    dropout: float = 0.0
    """Dropout rate of everything but the attention probabilities; one mask per solve."""
    attention_dropout: float = 0.0
    """Dropout rate of the attention probabilities; one mask per solve."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the layers' contractions: float32 or bfloat16. Parameters and the solver's state are float32 in both."""

    def __post_init__(self) -> None:
        if self.local_size < 0:
            raise ValueError(f"local_size must not be negative, got {self.local_size}")
        if self.affine_norm and not self.pre_norm:
            raise ValueError("affine_norm is for pre_norm only: set pre_norm too")
        for name, value, known in (
            ("norm", self.norm, ("layer", "rms")),
            ("positions", self.positions, ("relative", "rotary")),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        if self.positions == "rotary":
            rotary_angles((1,), self.d_head)
        check_rate("dropout", self.dropout)
        check_rate("attention_dropout", self.attention_dropout)
        compute_dtype(self.dtype)


class Memory(NamedTuple):
    """Transformer-XL memory: what attention sees of earlier segments. Right-aligned, of fixed size."""

    states_BMD: jax.Array
    """Equilibrium states."""
    injections_BMJ: jax.Array
    """Input injections at the same positions."""
    length_B: jax.Array
    """Number of valid entries, int32: the last ones. The others are masked."""


class Masks(NamedTuple):
    """Dropout masks of one solve, divided by the probability of keeping an entry. None drops nothing."""

    positions_1D: jax.Array | None = None
    probabilities_HBLK: jax.Array | None = None
    attended_B1D: jax.Array | None = None
    inner_B1F: jax.Array | None = None
    output_B1D: jax.Array | None = None


class Context(NamedTuple):
    """The constants of one solve: everything in f that does not depend on z."""

    qkv_D3HE: jax.Array
    """The kernel of queries, keys and values; that of the queries is divided by sqrt(E)."""
    injection_3HBLE: jax.Array
    """The injection; the part of the queries includes the content bias and is divided by sqrt(E)."""
    position_minus_content_H1E: jax.Array | None
    """The difference of the two biases of the queries, divided by sqrt(E); None with rotary positions."""
    memory_kv_2HBME: jax.Array | None
    """Keys and values of the memory, the keys rotated with rotary positions."""
    relative_keys_HRE: jax.Array | None
    """None with rotary positions."""
    bias_1BLK: jax.Array
    out_HED: jax.Array
    inner_DF: jax.Array
    gate_DF: jax.Array | None
    outer_FD: jax.Array
    masks: Masks


class TransformerCell(nnx.Module):
    """One Transformer-XL block whose attention input is injected: the map f of the DEQ-Transformer.

    With `pre_norm`, the residual of the feed-forward is its *normalized* input: otherwise no equilibrium is stable.

    With `affine_norm`, it is the block of TorchDEQ's language model (Geng and Kolter 2023, arXiv:2310.18605), which is unrolled
    a few times instead of being solved for. Its kernels start as N(0, 0.01^2) under weight normalization too. With `norm` rms,
    `positions` rotary and `gated` besides, and without `weight_norm`, it is the block of language models of today.

    Weights are normalized, and masks drawn, once per solve: `context` prepares what all evaluations share, `evaluate` is f.
    """

    def __init__(self, options: CellOptions, *, rngs: nnx.Rngs):
        self.options = options
        self.dtype = compute_dtype(options.dtype)
        d_model, width, heads = options.d_model, options.n_head * options.d_head, (options.n_head, options.d_head)

        def linear(d_in: int, d_out: int, *, use_bias: bool = True, split: Split | None = None) -> Linear:
            weight_norm, uniform = options.weight_norm, not options.affine_norm
            return Linear(d_in, d_out, use_bias=use_bias, weight_norm=weight_norm, uniform=uniform, split=split, rngs=rngs)

        # Split kernels come in pairs, so that only the second one's result is summed over devices. That of qkv is whole: its
        # outputs are queries, keys and values one after the other, and a contiguous part of them is not a set of heads.
        self.qkv = linear(d_model, 3 * width, use_bias=False)
        relative = options.positions == "relative"
        self.relative = linear(d_model, width, use_bias=False, split="outputs") if relative else None
        self.out = linear(width, d_model, split="inputs")
        self.content_bias_HE = normal_param(rngs.params(), heads, 0.01) if relative else None
        self.position_bias_HE = normal_param(rngs.params(), heads, 0.01) if relative else None
        self.inner = linear(d_model, options.d_inner, split="outputs")
        self.outer = linear(options.d_inner, d_model, split="inputs")
        self.gate = linear(d_model, options.d_inner, use_bias=False, split="outputs") if options.gated else None

        def norm(features: int) -> LayerNorm | RMSNorm | None:
            if not options.affine_norm:
                return None
            return LayerNorm(features, rngs=rngs) if options.norm == "layer" else RMSNorm(features)

        self.norm_before, self.norm_attended, self.norm_inner = norm(d_model), norm(width), norm(d_model)

    def __call__(
        self,
        z_BLD: jax.Array,
        injection_BLJ: jax.Array,
        memory: Memory,
        positions_KD: jax.Array,
        masks: Masks | None = None,
    ) -> jax.Array:
        """f(z) for given inputs: (B, L, D) -> (B, L, D). For several evaluations, use `context` once and `evaluate`."""
        return self.evaluate(z_BLD, self.context(injection_BLJ, memory, positions_KD, masks))

    def draw_masks(self, key: jax.Array | None, batch_size: int, length: int, n_memory: int) -> Masks:
        """The dropout masks of one solve; without a key nothing is dropped."""
        rate, attention_rate = self.options.dropout, self.options.attention_dropout
        d_model, features = self.options.d_model, (batch_size, 1, self.options.d_model)
        return Masks(
            *draw_masks(
                key,
                (rate, (1, d_model)),
                (attention_rate, (self.options.n_head, batch_size, length, n_memory + length)),
                (rate, features),
                (rate, (batch_size, 1, self.options.d_inner)),
                (rate, features),
            )
        )

    def context(self, injection_BLJ: jax.Array, memory: Memory, positions_KD: jax.Array, masks: Masks | None = None) -> Context:
        """Compute the constants of one solve.

        Args:
          injection_BLJ: added to queries, keys and values. Its axes B and L may be of size 1 where it is the same everywhere;
            likewise in the memory.
          memory: M states and injections of earlier segments; M may be 0.
          positions_KD: `position_encoding` of memory and segment together; of rotary positions, only K is used.
          masks: from `draw_masks`.
        """
        masks = masks or Masks()
        d_model, n_head, d_head = self.options.d_model, self.options.n_head, self.options.d_head
        n_memory, dtype = memory.states_BMD.shape[1], injection_BLJ.dtype
        length = positions_KD.shape[0] - n_memory
        kernel_D3HE = self.qkv.kernel().reshape(d_model, 3, n_head, d_head)
        scale = d_head**-0.5
        scale_3 = jnp.array([scale, 1, 1], dtype)
        injection_3HBLE, difference_H1E = self._split(injection_BLJ), None
        if self.content_bias_HE is not None and self.position_bias_HE is not None:
            content_HE, position_HE = self.content_bias_HE[...], self.position_bias_HE[...]
            injection_3HBLE = injection_3HBLE.at[0].add(content_HE[:, None, None])
            difference_H1E = ((position_HE - content_HE) * scale)[:, None]
        mask_BLK = attention_mask(length, n_memory, memory.length_B, self.options.local_size)
        return Context(
            qkv_D3HE=self._narrow(kernel_D3HE * scale_3[None, :, None, None]),
            injection_3HBLE=injection_3HBLE * scale_3[:, None, None, None, None],
            position_minus_content_H1E=difference_H1E,
            memory_kv_2HBME=self._memory_keys_values(memory, kernel_D3HE) if n_memory else None,
            relative_keys_HRE=self._relative_keys(apply_mask(positions_KD, masks.positions_1D)),
            bias_1BLK=mask_to_bias(mask_BLK, dtype),
            out_HED=self._narrow(self.out.kernel().reshape(n_head, d_head, d_model)),
            inner_DF=self._narrow(self.inner.kernel()),
            gate_DF=None if self.gate is None else self._narrow(self.gate.kernel()),
            outer_FD=self._narrow(self.outer.kernel()),
            masks=masks,
        )

    def evaluate(self, z_BLD: jax.Array, context: Context) -> jax.Array:
        """f(z): (B, L, D) -> (B, L, D), causal along L, of the type of z."""
        attended_BLD = apply_mask(self._attend(z_BLD, context), context.masks.attended_B1D)
        sum_BLD = z_BLD + attended_BLD
        # With and without pre_norm, the feed-forward's input is the normalized sum; so is its residual unless norms are affine.
        x_BLD = self._normalize(sum_BLD) if self.norm_inner is None else self.norm_inner(sum_BLD)
        residual_BLD = x_BLD if self.norm_inner is None else sum_BLD
        inner_BLF = contract_narrow("bld,df->blf", x_BLD, context.inner_DF, self.dtype)
        inner_BLF = _add_bias(inner_BLF, self.inner)
        if context.gate_DF is None:
            inner_BLF = jax.nn.relu(inner_BLF)
        else:
            inner_BLF = inner_BLF * jax.nn.silu(contract_narrow("bld,df->blf", x_BLD, context.gate_DF, self.dtype))
        inner_BLF = apply_mask(inner_BLF, context.masks.inner_B1F)
        outer_BLD = whole(_add_bias(contract("blf,fd->bld", inner_BLF, context.outer_FD, self.dtype), self.outer))
        sum_BLD = residual_BLD + apply_mask(outer_BLD, context.masks.output_B1D)
        return (sum_BLD if self.options.pre_norm else self._normalize(sum_BLD)).astype(z_BLD.dtype)

    def _attend(self, z_BLD: jax.Array, context: Context) -> jax.Array:
        """The attention layer, (B, L, D) -> (B, L, D)."""
        x_BLD = self._attention_input(z_BLD)
        heads_3HBLE = contract("bld,dnhe->nhble", x_BLD, context.qkv_D3HE, self.dtype) + context.injection_3HBLE
        q_HBLE, k_HBKE, v_HBKE = heads_3HBLE
        n_memory = 0 if context.memory_kv_2HBME is None else context.memory_kv_2HBME.shape[3]
        if self.relative is None:
            q_HBLE, k_HBKE = (self._rotate(heads, n_memory) for heads in (q_HBLE, k_HBKE))
        if context.memory_kv_2HBME is not None:
            memory_k_HBME, memory_v_HBME = context.memory_kv_2HBME
            k_HBKE = jnp.concatenate([memory_k_HBME, k_HBKE], axis=2)
            v_HBKE = jnp.concatenate([memory_v_HBME, v_HBKE], axis=2)
        drop_HBLK, bias_1BLK = context.masks.probabilities_HBLK, context.bias_1BLK
        if context.relative_keys_HRE is None or context.position_minus_content_H1E is None:
            attended_BLHE = attention(q_HBLE, k_HBKE, v_HBKE, bias_1BLK, probability_mask=drop_HBLK, dtype=self.dtype)
        else:
            attended_BLHE = relative_attention(
                q_HBLE,
                q_HBLE + context.position_minus_content_H1E[:, None],
                k_HBKE,
                v_HBKE,
                context.relative_keys_HRE,
                bias_1BLK,
                probability_mask=drop_HBLK,
                dtype=self.dtype,
            )
        if self.norm_attended is not None:
            attended_BLHE = self.norm_attended(attended_BLHE.reshape(*z_BLD.shape[:2], -1)).reshape(attended_BLHE.shape)
        return whole(_add_bias(contract("blhe,hed->bld", attended_BLHE, context.out_HED, self.dtype), self.out))

    def _memory_keys_values(self, memory: Memory, kernel_D3HE: jax.Array) -> jax.Array:
        x_BMD = self._attention_input(memory.states_BMD)
        projected_2HBME = contract("bmd,dnhe->nhbme", x_BMD, kernel_D3HE[:, 1:], self.dtype)
        kv_2HBME = projected_2HBME + self._split(memory.injections_BMJ)[1:]
        return kv_2HBME if self.relative is not None else kv_2HBME.at[0].set(self._rotate(kv_2HBME[0], 0))

    def _rotate(self, x_HBLE: jax.Array, start: int) -> jax.Array:
        """Queries or keys with rotary positions, which count from `start`: scores depend on differences alone."""
        heads, batch_size, length, width = x_HBLE.shape
        angles_LF = rotary_angles((start + length,), width)[start:]
        return rotate(x_HBLE.reshape(heads * batch_size, length, 1, width), angles_LF).reshape(x_HBLE.shape)

    def _attention_input(self, x_BLD: jax.Array) -> jax.Array:
        """The states as attention sees them: normalized with `pre_norm`."""
        if self.norm_before is not None:
            return self.norm_before(x_BLD)
        return self._normalize(x_BLD) if self.options.pre_norm else x_BLD

    def _normalize(self, x_BLD: jax.Array) -> jax.Array:
        """The norm without parameters."""
        return layer_norm(x_BLD) if self.options.norm == "layer" else rms_norm(x_BLD)

    def _relative_keys(self, positions_KD: jax.Array) -> jax.Array | None:
        """The relative keys (H, R, E): a row of zeros as filler, then a key for each position."""
        if self.relative is None:
            return None
        keys_KHE = self.relative(positions_KD, self.dtype).reshape(-1, self.options.n_head, self.options.d_head)
        return self._narrow(jnp.pad(keys_KHE.transpose(1, 0, 2), ((0, 0), (1, 0), (0, 0))))

    def _split(self, injection_BLJ: jax.Array) -> jax.Array:
        """(B, L, J) -> (3, H, B, L, E)."""
        heads = 3, self.options.n_head, self.options.d_head
        return injection_BLJ.reshape(*injection_BLJ.shape[:2], *heads).transpose(2, 3, 0, 1, 4)

    def _narrow(self, kernel: jax.Array) -> jax.Array:
        return kernel if self.dtype is None else kernel.astype(self.dtype)


def _add_bias(x_BLO: jax.Array, layer: Linear) -> jax.Array:
    assert layer.bias_O is not None
    return x_BLO + layer.bias_O[...].astype(x_BLO.dtype)[None, None]
