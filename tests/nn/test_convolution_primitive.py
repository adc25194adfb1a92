"""The primitive has the derivatives that JAX gives a convolution, in every mode, and batches like one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deq_flax.nn.convolution_primitive import Window, convolve_nhwc

WINDOWS = [
    Window((1, 1), ((1, 1), (1, 1))),
    Window((2, 2), ((1, 1), (1, 1))),
    Window((2, 1), ((0, 2), (1, 0)), (1, 3), (2, 1)),
]


def lax_convolution(x, kernel, window):
    dilation = dict(lhs_dilation=window.x_dilation, rhs_dilation=window.kernel_dilation)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, window.strides, window.padding, dimension_numbers=numbers, **dilation)


def operands(*leading):
    random = np.random.default_rng(0)
    return random.normal(size=(*leading, 2, 8, 7, 3)), random.normal(size=(*leading, 3, 3, 3, 4))


def derivatives(f):
    """The map (x, kernel) -> f and its directional derivative, both gradients, and the gradients of their size."""

    def all_of_them(x, kernel):
        def value(x, kernel):
            return jnp.sum(jnp.sin(f(x, kernel)))

        def size(x, kernel):
            return sum(jnp.sum(g**2) for g in jax.grad(value, (0, 1))(x, kernel))

        tangents = jax.jvp(f, (x, kernel), (jnp.cos(x), jnp.sin(kernel)))
        return tangents, jax.grad(value, (0, 1))(x, kernel), jax.grad(size, (0, 1))(x, kernel)

    return jax.jit(all_of_them)


@pytest.mark.parametrize("window", WINDOWS)
def test_derivatives(window):
    with jax.enable_x64(True):
        ours = derivatives(lambda x, k: convolve_nhwc(x, k, window))(*operands())
        theirs = derivatives(lambda x, k: lax_convolution(x, k, window))(*operands())
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_batching(axes):
    x, kernel = operands(2)
    x, kernel = x if axes[0] == 0 else x[0], kernel if axes[1] == 0 else kernel[0]
    with jax.enable_x64(True):
        ours, theirs = (
            jax.jit(jax.vmap(lambda a, b, f=f: f(a, b, WINDOWS[1]), axes))(x, kernel) for f in (convolve_nhwc, lax_convolution)
        )
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_derivatives_in_a_loop_keep_the_layout():
    """On the CPU, XLA has fast programs inside a loop for this layout only."""
    x, kernel = (jnp.asarray(a, jnp.float32) for a in operands())

    def loop(x, kernel):
        _, pull = jax.vjp(lambda x, k: convolve_nhwc(x, k, WINDOWS[0]), x, kernel)
        g = jnp.ones((2, 8, 7, 4))
        return lax.fori_loop(0, 3, lambda i, total: jax.tree.map(jnp.add, total, pull(g * i)), (x, kernel))

    text = jax.jit(loop).lower(x, kernel).as_text()
    layouts = [part.split("x[")[0] for part in text.split("dim_numbers = ")[1:]]
    assert len(layouts) >= 2 and all(layout.startswith("[b, 0, 1, f]") for layout in layouts)
    kernels = [part.split("x[")[1].split("]")[0] for part in text.split("dim_numbers = ")[1:]]
    assert set(kernels) == {"0, 1, i, o"}
