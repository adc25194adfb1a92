"""Spectral normalization of the kernels of a cell, once per solve and outside of it.

A cell whose linear maps have spectral norm below 1, between activations of slope at most 1, is a contraction: its
equilibrium is unique and every solver finds it.
"""

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.solution import norm


def spectral_normalized(kernel: jax.Array, u: jax.Array, *, bound: float = 1.0, steps: int = 1) -> tuple[jax.Array, jax.Array]:
    """Return the kernel, scaled down if its spectral norm is above `bound` (Miyato et al. 2018, section 2.1 and algorithm 1).

    The norm is estimated by power iteration from u, which is state: pass the returned u to the next call, and one step of
    iteration follows the kernel as it trains. Gradients flow through the scale, with u held constant.

    >>> kernel, u = spectral_normalized(module.kernel[...], module.u[...], bound=0.9)
    >>> module.u[...] = u  # in training; leave it in evaluation
    >>> sol = fixed_point(lambda z, x: jnp.tanh(z @ kernel + x), z0, x)

    Args:
      kernel: (..., O); all axes but the last are inputs, as in Flax's linear layers and convolutions. For a convolution this
        bounds the norm of the kernel as a matrix, not that of the convolution.
      u: (O,) estimate of the first right singular vector; start with any random vector.
      bound: largest spectral norm allowed.
      steps: number of power iterations.

    Returns:
      The kernel, and the new u, (O,) of unit norm without gradient.

    Raises:
      ValueError: u does not fit the kernel, or an option is out of range.
    """
    if u.shape != kernel.shape[-1:] or kernel.ndim < 2:
        raise ValueError(
            f"spectral_normalized: a kernel {list(kernel.shape)} needs u of shape [{kernel.shape[-1]}], not {u.shape}"
        )
    if steps < 1 or not bound > 0:
        raise ValueError(f"spectral_normalized: steps must be at least 1 and bound positive, not {steps} and {bound}")
    matrix = jnp.reshape(kernel, (-1, kernel.shape[-1]))
    constant = jax.lax.stop_gradient(matrix)
    v = jnp.zeros(matrix.shape[0], kernel.dtype)
    with jax.default_matmul_precision("highest"):  # accelerators round operands by default, and the bound with them
        for _ in range(steps):
            v = _unit(constant @ u)
            u = _unit(v @ constant)
        u, v = jax.lax.stop_gradient((u, v))
        spectral_norm = v @ matrix @ u
    return kernel * (bound / jnp.maximum(spectral_norm, bound)), u


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(norm(x), jnp.finfo(x.dtype).tiny)
