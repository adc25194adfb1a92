"""Spectral normalization against the singular values of numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import spectral_normalized

KERNEL = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
U = np.ones(5, np.float32)


@pytest.mark.slow
def test_a_norm_above_the_bound_is_scaled_to_it_and_a_smaller_one_kept():
    normalize = jax.jit(spectral_normalized, static_argnames=("bound", "steps"))
    kernel, u = jax.device_get(normalize(KERNEL, U, bound=0.9, steps=60))
    singular = np.linalg.svd(np.asarray(KERNEL).reshape(6, 5))
    np.testing.assert_allclose(np.linalg.norm(np.asarray(kernel).reshape(6, 5), 2), 0.9, rtol=1e-4)
    np.testing.assert_allclose(np.abs(u @ singular[2][0]), 1.0, rtol=1e-4)
    small, _ = normalize(np.float32(0.01) * KERNEL, U, bound=0.9, steps=60)
    np.testing.assert_array_equal(small, np.float32(0.01) * KERNEL)


def test_one_step_per_call_converges_over_calls():
    normalize = jax.jit(spectral_normalized)
    u = U
    for _ in range(60):
        kernel, u = normalize(KERNEL, u)
    np.testing.assert_allclose(np.linalg.norm(np.asarray(kernel).reshape(6, 5), 2), 1.0, rtol=1e-4)


def test_gradient_is_that_of_the_kernel_over_its_largest_singular_value():
    weights = np.arange(30, dtype=np.float32).reshape(KERNEL.shape)
    u, _, v = np.linalg.svd(KERNEL.reshape(6, 5))
    exact = lambda k: jnp.vdot(weights, k / (u[:, 0] @ k.reshape(6, 5) @ v[0]))  # noqa: E731  its gradient, by perturbation theory
    normalized = lambda k: jnp.vdot(weights, spectral_normalized(k, v[0])[0])  # noqa: E731
    ours, exact = jax.jit(lambda k: (jax.grad(normalized)(k), jax.grad(exact)(k)))(KERNEL)
    np.testing.assert_allclose(ours, exact, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("options", [{"u": np.ones(6)}, {"bound": 0.0}, {"steps": 0}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="spectral_normalized"):
        spectral_normalized(**{"kernel": KERNEL, "u": U, **options})
