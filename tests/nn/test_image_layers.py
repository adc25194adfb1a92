"""Laws of the layers for images: convolutions, norms, resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.nn.convolution import Conv, convolve
from deq_flax.nn.multiscale import MultiscaleCell, MultiscaleOptions
from deq_flax.nn.normalization import BatchNorm, GroupNorm
from deq_flax.nn.resize import enlarge_nearest, resize_bilinear


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def close(a, b, error=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=error)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_a_convolution_is_a_sum_over_its_window(size, stride):
    x, kernel = normal(1, 6, 5, 2), normal(size, size, 2, 3, seed=1)
    found, half = convolve(x, kernel, stride), size // 2
    padded = np.pad(x, [(0, 0), (half, half), (half, half), (0, 0)])
    for row in range(found.shape[1]):
        for column in range(found.shape[2]):
            window = padded[0, row * stride : row * stride + size, column * stride : column * stride + size]
            close(found[0, row, column], np.einsum("hwi,hwio->o", window, kernel))
    assert found.shape[1:3] == (-(-6 // stride), -(-5 // stride))


def test_weight_normalization_starts_as_v_and_has_norm_g():
    conv = Conv(4, 6, 3, weight_norm=True, rngs=nnx.Rngs(0))
    close(conv.kernel(), conv.v_HWIO[...], 1e-6)
    assert np.abs(conv.v_HWIO[...]).max() <= 1 / 6
    conv.v_HWIO[...], conv.g_O[...] = normal(3, 3, 4, 6), jnp.arange(1.0, 7.0)
    close(np.linalg.norm(np.reshape(conv.kernel(), (-1, 6)), axis=0), np.arange(1.0, 7.0))


def test_group_norm_normalizes_each_group_of_each_image():
    norm, x = GroupNorm(6, 3), 5 + 2 * normal(2, 4, 3, 6)
    y = np.asarray(norm(x)).reshape(2, 12, 3, 2)
    close(y.mean((1, 3)), 0)
    close(y.var((1, 3)), 1, 1e-4)
    norm.scale_C[...], norm.bias_C[...] = jnp.arange(6.0), -jnp.arange(6.0)
    close(norm(x), y.reshape(x.shape) * np.arange(6) - np.arange(6))
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert GroupNorm(6, 3, affine=False).scale_C is None
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4 groups"):
        GroupNorm(6, 4)


def test_group_norm_is_accurate_far_from_zero_and_finite_without_variance():
    norm, x = GroupNorm(8, 2), 30 + normal(2, 4, 3, 8)
    wide = np.asarray(x, np.float64).reshape(2, 12, 2, 4)
    centered = wide - wide.mean((1, 3), keepdims=True)
    close(norm(x), (centered / np.sqrt(wide.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape), 2e-3)
    constants = jnp.broadcast_to(jnp.linspace(100, 5000, 200)[:, None, None, None], (200, 5, 5, 8))
    assert np.isfinite(norm(constants)).all()  # the mean square of some is rounded below the squared mean


def test_batch_norm_trains_on_the_batch_and_evaluates_with_running_statistics():
    norm, x = BatchNorm(3, momentum=0.25), 5 + 2 * normal(4, 2, 2, 3)
    before = norm(x, False)
    close(before, x / np.sqrt(1 + 1e-5))
    y = np.asarray(norm(x, True)).reshape(-1, 3)
    close(y.mean(0), 0)
    close(y.var(0), 1, 1e-4)
    flat = np.asarray(x).reshape(-1, 3)
    close(norm.mean_C[...], 0.25 * flat.mean(0))
    close(norm.variance_C[...], 0.75 + 0.25 * flat.var(0, ddof=1))
    kept = norm.mean_C[...], norm.variance_C[...]
    close(norm(x, False), (x - kept[0][None, None, None]) / np.sqrt(kept[1] + 1e-5)[None, None, None])
    assert all((a == b).all() for a, b in zip(kept, (norm.mean_C[...], norm.variance_C[...]), strict=True))


def test_no_gradient_goes_into_running_statistics():
    def remembered(x):
        norm = BatchNorm(3)
        norm(x, True)
        return norm.mean_C[...].sum() + norm.variance_C[...].sum()

    assert not jax.grad(remembered)(normal(4, 2, 2, 3)).any()


@pytest.mark.parametrize("size", [(7, 9), (4, 5), (2, 2), (1, 3)])
def test_bilinear_resizing_is_exact_for_bilinear_images_and_keeps_corners(size):
    def image(height, width):
        y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
        return np.stack([1 + 2 * y - x, 3 * x * y], axis=-1)[None].astype(np.float32)

    height = max(size[0], 2)
    close(resize_bilinear(jnp.asarray(image(4, 5)), size), image(height, size[1])[:, : size[0]])


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("size", [(4, 6), (6, 10), (7, 5), (2, 3)])
def test_enlarging_repeats_pixels_and_its_gradient_sums_over_them(batch, size):
    """From 2 x 3, up to four times: few images and many, which are enlarged in two ways."""
    x, cotangent = normal(batch, 2, 3, 4), normal(batch, *size, 4, seed=1)
    enlarged, transpose = jax.vjp(lambda x: enlarge_nearest(x, size), x)
    factor = next(factor for factor in (1, 2, 4) if 2 * factor >= size[0] and 3 * factor >= size[1])
    rows, columns = (np.arange(length) // factor for length in size)
    close(enlarged, np.asarray(x)[:, rows][:, :, columns])
    summed = np.zeros(x.shape)
    np.add.at(summed, (slice(None), rows[:, None], columns[None, :]), np.asarray(cotangent))
    close(transpose(cotangent)[0], summed)


@pytest.mark.parametrize("sizes", [((8, 8), (4, 4), (2, 2), (1, 1)), ((7, 10), (4, 5), (2, 3), (1, 2))])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_branches_halve_rounding_up_and_keep_their_shapes(n, sizes):
    cell = MultiscaleCell(MultiscaleOptions(channels=(4, 4, 8, 8)[:n], expansion=2, groups=2), rngs=nnx.Rngs(0))
    injection = normal(2, *sizes[0], 4)
    z0 = cell.fresh_state(injection)
    assert [z.shape[1:3] for z in z0] == list(sizes[:n])
    assert [z.shape for z in jax.eval_shape(cell, z0, injection)] == [z.shape for z in z0]


@pytest.mark.slow
def test_masks_drop_whole_channels_of_an_image():
    cell = MultiscaleCell(MultiscaleOptions(channels=(16, 32), groups=4, dropout=0.5), rngs=nnx.Rngs(0))
    masks = cell.draw_masks(jax.random.key(0), 40)
    assert [mask.shape for mask in masks] == [(40, 1, 1, 16), (40, 1, 1, 32)]
    assert {float(x) for mask in masks for x in np.unique(mask)} == {0.0, 2.0}
    assert abs(masks[1].mean() - 1) < 0.1
    assert cell.draw_masks(None, 40) == (None, None)
    z, injection = (normal(2, 4, 4, 16), normal(2, 2, 2, 32)), normal(2, 4, 4, 16, seed=1)
    masks = tuple(mask[:2] for mask in masks)
    f = jax.jit(lambda mask: cell(z, injection, (mask, None))[0])
    assert (f(masks[0]) != f(jnp.ones_like(masks[0]))).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(channels=(8,) * 5), "one to four branches"),
        (dict(channels=()), "one to four branches"),
        (dict(channels=(8, 8), big_kernels=(1,)), "big_kernels"),
        (dict(channels=(8, 8), big_kernels=(1, 3)), "big_kernels"),
        (dict(channels=(8, 8), fuse_weight_norm="some"), "known: none, post, all"),
        (dict(channels=(8, 12)), "channels cannot be divided into 8 groups"),
        (dict(channels=(8,), dropout=1.0), "dropout must lie in"),
        (dict(channels=(8,), dtype="float16"), "unknown dtype"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: MultiscaleCell(MultiscaleOptions(**options), rngs=nnx.Rngs(0)))
