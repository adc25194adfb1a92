"""Jacobian loss and spectral radius against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import jacobian_loss, spectral_radius

W = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)


def f(z):
    return jnp.tanh(z @ W)


def test_jacobian_loss_estimates_the_squared_frobenius_norm_per_element():
    estimate = jax.jit(lambda z, key: jacobian_loss(f, z, key, samples=2000))(np.zeros((4, 6), np.float32), jax.random.key(1))
    np.testing.assert_allclose(estimate, np.sum(W**2) / 6, rtol=0.05)


def test_jacobian_loss_with_explicit_vectors_is_the_formula():
    z, v = np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32)
    rows = [(v[b] * (1 - np.tanh(z[b] @ W) ** 2)) @ W.T for b in range(3)]
    ours = jax.jit(lambda z: jacobian_loss(f, z, vectors=v))(z)
    np.testing.assert_allclose(ours, np.sum(np.square(rows)) / 18, rtol=1e-5)


def test_jacobian_loss_differentiates_through_z_only_when_asked():
    loss = lambda z: jacobian_loss(f, z, vectors=np.ones((2, 6), np.float32))  # noqa: E731
    through = jax.grad(loss)
    constant = jax.grad(lambda z: loss(jax.lax.stop_gradient(z)))
    yes, no = jax.jit(lambda z: (through(z), constant(z)))(np.full((2, 6), 0.3, np.float32))
    assert np.abs(yes).min() > 0
    np.testing.assert_array_equal(no, np.zeros((2, 6)))


def test_jacobian_loss_without_key_or_vectors_is_refused():
    with pytest.raises(ValueError, match="key"):
        jacobian_loss(jnp.tanh, jnp.zeros((1, 2)))


def matrices():
    """Non-symmetric: a rotation (complex pair, Rayleigh quotient 0), a shear (far from normal), a random one."""
    rotation = 0.99 * np.array([[0.0, 1.0], [-1.0, 0.0]])
    shear = np.array([[0.5, 10.0], [0.0, 0.8]])
    random = np.random.default_rng(0).normal(size=(2, 2))
    return np.stack([rotation, shear, random]).astype(np.float32)


def test_spectral_radius_of_non_symmetric_jacobians():
    a = matrices()
    f = lambda z: jnp.einsum("bij,bj->bi", a, z)  # noqa: E731
    rho = jax.jit(lambda z, key: spectral_radius(f, z, key, steps=200))(np.zeros((3, 2), np.float32), jax.random.key(0))
    np.testing.assert_allclose(rho, np.abs(np.linalg.eigvals(np.asarray(a))).max(axis=1), rtol=0.02)


def test_spectral_radius_of_a_constant_map_is_zero():
    rho = jax.jit(lambda z, key: spectral_radius(lambda z: 0.0 * z + 1.0, z, key))(
        np.ones((1, 4), np.float32), jax.random.key(0)
    )
    assert rho[0] < 1e-30
