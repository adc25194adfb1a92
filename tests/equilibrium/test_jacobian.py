"""Jacobian loss and spectral radius against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import jacobian_loss, spectral_radius


def test_jacobian_loss_estimates_the_squared_frobenius_norm_per_element():
    w = jax.random.normal(jax.random.key(0), (10, 10))
    z = jnp.zeros((4, 10))
    estimate = jacobian_loss(lambda z: jnp.tanh(z @ w), z, jax.random.key(1), samples=2000)
    np.testing.assert_allclose(estimate, jnp.sum(w**2) / 10, rtol=0.05)


def test_jacobian_loss_with_explicit_vectors_is_the_formula():
    w = jax.random.normal(jax.random.key(0), (6, 6))
    z, v = jax.random.normal(jax.random.key(1), (2, 3, 6))
    f = lambda z: jnp.tanh(z @ w)  # noqa: E731
    rows = jnp.stack([v[b] @ jax.jacobian(f)(z[b]) for b in range(3)])
    np.testing.assert_allclose(jacobian_loss(f, z, vectors=v), jnp.sum(rows**2) / 18, rtol=1e-5)


def test_jacobian_loss_differentiates_through_z_only_when_asked():
    w = 0.5 * jnp.eye(3)
    loss = lambda z: jacobian_loss(lambda z: jnp.tanh(z @ w), z, vectors=jnp.ones((2, 3)))  # noqa: E731
    z = jnp.ones((2, 3))
    assert jnp.abs(jax.grad(loss)(z)).min() > 0
    np.testing.assert_array_equal(jax.grad(lambda z: loss(jax.lax.stop_gradient(z)))(z), jnp.zeros_like(z))


def test_jacobian_loss_needs_randomness_from_somewhere():
    with pytest.raises(ValueError, match="key"):
        jacobian_loss(jnp.tanh, jnp.zeros((1, 2)))


def matrices():
    """Non-symmetric: a rotation (complex pair, Rayleigh quotient 0), a shear (far from normal), a random one."""
    rotation = 0.99 * np.array([[0.0, 1.0], [-1.0, 0.0]])
    shear = np.array([[0.5, 10.0], [0.0, 0.8]])
    random = np.random.default_rng(0).normal(size=(2, 2))
    return jnp.asarray(np.stack([rotation, shear, random]), jnp.float32)


def test_spectral_radius_of_non_symmetric_jacobians():
    a = matrices()
    rho = spectral_radius(lambda z: jnp.einsum("bij,bj->bi", a, z), jnp.zeros((3, 2)), jax.random.key(0), steps=200)
    np.testing.assert_allclose(rho, np.abs(np.linalg.eigvals(np.asarray(a))).max(axis=1), rtol=0.02)


def test_spectral_radius_of_a_constant_map_is_zero():
    assert spectral_radius(lambda z: 0.0 * z + 1.0, jnp.ones((1, 4)), jax.random.key(0))[0] < 1e-30
