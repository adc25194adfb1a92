"""The affine block against its formulas. Blocks of other options are tested against the authors' numbers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.nn.attention import position_encoding
from deq_flax.nn.transformer import CellOptions, Memory, TransformerCell
from deq_flax.nn.transformer_stack import TransformerStack

B, L, M, D, H, E, F = 2, 4, 3, 8, 2, 4, 12


def cell_options(**changed):
    return CellOptions(**dict(d_model=D, n_head=H, d_head=E, d_inner=F, pre_norm=True, affine_norm=True) | changed)


def cell(seed=0, **options):
    made = TransformerCell(cell_options(**options), rngs=nnx.Rngs(seed))
    # Values far from the initial ones, so that an unused parameter shows.
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    for _, param in nnx.iter_graph(made):
        if isinstance(param, nnx.Param):
            param[...] = param[...] + 0.3 * jax.random.normal(next(keys), param.shape)
    return made


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed + 7), 4)
    z_BLD, injection_BLJ = jax.random.normal(keys[0], (B, L, D)), jax.random.normal(keys[1], (B, L, 3 * H * E))
    states, injections = jax.random.normal(keys[2], (B, M, D)), jax.random.normal(keys[3], (B, M, 3 * H * E))
    return z_BLD, injection_BLJ, Memory(states, injections, jnp.full((B,), M)), position_encoding(M + L, D)


NO_POSITIONS = dict(
    relative=SimpleNamespace(kernel=lambda: np.zeros((D, H * E))),
    content_bias_HE=np.zeros((H, E)),
    position_bias_HE=np.zeros((H, E)),
)


def turned(x_BKHE, start):
    """Each pair of features (i, i + E/2), as a complex number, turned by its position times 10000^(-2i/E), from any start."""
    pairs = x_BKHE[..., : E // 2] + 1j * x_BKHE[..., E // 2 :]
    places = start + np.arange(x_BKHE.shape[1])
    pairs = pairs * np.exp(1j * places[:, None] * 10_000.0 ** (-2 * np.arange(E // 2) / E))[None, :, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def written_out(cell, z_BLD, injection_BLJ, memory, positions_KD):
    """The affine block for one sample, head, query and key at a time."""

    rms, rotary = cell.options.norm == "rms", cell.options.positions == "rotary"

    def norm(x, module):
        if rms:
            return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * np.asarray(module.scale_D[...])
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * np.asarray(module.scale_D[...]) + np.asarray(module.bias_D[...])

    z, states = np.asarray(z_BLD), np.concatenate([memory.states_BMD, z_BLD], axis=1)
    injection = np.concatenate([memory.injections_BMJ, injection_BLJ], axis=1)
    qkv = norm(states, cell.norm_before) @ np.asarray(cell.qkv.kernel()) + injection
    q, k, v = (part.reshape(B, M + L, H, E) for part in np.split(qkv, 3, axis=-1))
    if rotary:
        q, k = (turned(x, 0.37) for x in (q, k))
        cell = SimpleNamespace(**vars(cell) | NO_POSITIONS)
    relative = (np.asarray(positions_KD) @ np.asarray(cell.relative.kernel())).reshape(M + L, H, E)[::-1]  # by distance
    content, position = np.asarray(cell.content_bias_HE[...]), np.asarray(cell.position_bias_HE[...])
    attended = np.zeros((B, L, H, E))
    for b, h, i in np.ndindex(B, H, L):
        here = q[b, M + i, h]
        scores = np.array(
            [
                ((here + content[h]) @ k[b, j, h] + (here + position[h]) @ relative[M + i - j, h]) / np.sqrt(E)
                for j in range(M + i + 1)
            ]
        )
        weights = np.exp(scores - scores.max())
        attended[b, i, h] = (weights / weights.sum()) @ v[b, : M + i + 1, h]
    out = norm(attended.reshape(B, L, H * E), cell.norm_attended) @ np.asarray(cell.out.kernel())
    x = z + out + np.asarray(cell.out.bias_O[...])
    before = norm(x, cell.norm_inner)
    inner = before @ np.asarray(cell.inner.kernel()) + np.asarray(cell.inner.bias_O[...])
    if cell.gate is None:
        inner = np.maximum(inner, 0)
    else:
        gate = before @ np.asarray(cell.gate.kernel())
        inner *= gate / (1 + np.exp(-gate))
    return x + inner @ np.asarray(cell.outer.kernel()) + np.asarray(cell.outer.bias_O[...])


TODAY = dict(norm="rms", positions="rotary", gated=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, TODAY])
def test_the_affine_block_is_its_formulas(options):
    block, given = cell(**options), inputs()
    np.testing.assert_allclose(nnx.jit(block)(*given), written_out(block, *given), rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_a_stack_is_its_blocks_in_sequence():
    z_BLD, *rest = inputs()
    stack = TransformerStack(cell_options(dropout=0.5), blocks=3, rngs=nnx.Rngs(0))
    masks = stack.draw_masks(jax.random.key(1), B, L, M)
    together = stack.evaluate(z_BLD, stack.context(*rest, masks))
    for block, mask in zip(stack.blocks, masks, strict=True):
        z_BLD = block(z_BLD, *rest, mask)
    np.testing.assert_array_equal(together, z_BLD)
    assert not np.array_equal(masks[0].inner_B1F, masks[1].inner_B1F)
    np.testing.assert_array_equal(masks[0].positions_1D, masks[2].positions_1D)


def test_affine_norms_require_pre_norm():
    with pytest.raises(ValueError, match="set pre_norm too"):
        cell(pre_norm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(norm="batch"), "unknown norm"),
        (dict(positions="none"), "known: relative, rotary"),
        (dict(positions="rotary", d_head=3), "a multiple of 2"),
    ],
)
def test_wrong_options_of_a_block_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cell(**options)
