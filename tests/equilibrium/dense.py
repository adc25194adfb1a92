"""A small problem whose gradients a dense linear solve gives: z = tanh(z w + x)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from deq_flax import Picard, fixed_point

# The loops of Picard are the cheapest to compile.
TIGHT = Picard(tol=1e-13, max_steps=200)
LOOSE = Picard(tol=1e-5)
WEIGHTS = np.arange(1.0, 7.0)


def problem(batch=3):
    """Return w (6, 6), x and a direction (batch, 6): numpy arrays of the current precision, so that nothing is compiled."""
    rng = np.random.default_rng(0)
    draw = lambda rows: rng.normal(size=(rows, 6)).astype(jnp.result_type(float))  # noqa: E731
    w, x, v = 0.7 * draw(6) / np.float32(6**0.5), draw(3), draw(3)
    return w, x[:batch], v[:batch]


def cell(z, w, x):
    return jnp.tanh(z @ w + x)


def loss(z):
    return jnp.sum(jnp.sin(z) * jnp.asarray(WEIGHTS, z.dtype)[None])


@functools.partial(jax.jit, static_argnames=("solver", "gradient", "on_failure"))
def _run(w, x, solver, gradient, on_failure):
    def total(w, x):
        sol = fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=gradient, on_failure=on_failure)
        return loss(sol.value), sol

    return jax.grad(total, argnums=(0, 1), has_aux=True)(w, x)


class Run:
    """The solution of the problem and the gradients of its loss with respect to w and x."""

    def __init__(self, gradients, solution):
        self.gradients = gradients
        self.value, self.stats, self.trajectory = solution.value, solution.stats, solution.trajectory


def run(w, x, solver, gradient, on_failure="return"):
    return Run(*jax.device_get(_run(w, x, solver, gradient, on_failure)))


def gradients(result):
    return result.gradients


def adjoint(w, x, z, direction):
    """Return the gradients at z by numpy, with direction(J, v) in place of (I - J^T)^{-1} v; J and v of one sample."""
    w, x, z = np.asarray(w), np.asarray(x), np.asarray(z)
    slope = 1 - np.tanh(z @ w + x) ** 2
    upstream = np.cos(z) * WEIGHTS
    directions = np.stack([direction(s[:, None] * w.T, v) for s, v in zip(slope, upstream, strict=True)])
    return np.einsum("bi,bj->ij", z, slope * directions), slope * directions


def close(a, b, rtol=1e-9, atol=1e-11):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
