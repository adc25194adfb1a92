"""Scales: gradients do not depend on that of the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import (
    GMRES,
    SHINE,
    Anderson,
    Broyden,
    Implicit,
    JacobianFree,
    Neumann,
    PhantomGradient,
    Picard,
    Reversible,
    Unroll,
    fixed_point,
)
from tests.equilibrium.dense import adjoint, cell, loss, problem

GRADIENTS = [
    Implicit(),
    Implicit(Picard()),
    Implicit(Anderson(max_steps=80)),
    Implicit(Broyden(memory=8)),
    Implicit(Broyden(line_search=True)),
    Implicit(GMRES(restart=4)),
    Implicit(GMRES()),
    Neumann(),
    JacobianFree(),
    PhantomGradient(),
    SHINE(),
    SHINE(refine_steps=9),
    Reversible(),
    Unroll(20),
]
SCALES = np.float32([1.0, 1e-30, 1e-4, 1e4, 1e30])


@functools.partial(jax.jit, static_argnames=("solver", "gradient"))
def slopes(w, x, scales, solver, gradient):
    """Return the gradients of scale times the loss, for each scale, and the equilibria."""

    def total(w, x, scale):
        sol = fixed_point(cell, jnp.zeros_like(x), w, x, solver=solver, gradient=gradient)
        return scale * loss(sol.value), sol.value

    return jax.vmap(jax.grad(total, argnums=(0, 1), has_aux=True), (None, None, 0))(w, x, scales)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_gradient_is_invariant_to_the_scale_of_the_loss(gradient):
    """In float32, where the square of a number below 1e-19 or above 1e19 is none; the forward tolerance is absolute."""
    w, x, _ = problem()
    (dw, dx), z = jax.device_get(slopes(w, x, SCALES, Broyden(tol=1e-5, stop="absolute"), gradient))
    for slope in (dw, dx):
        unit = slope / SCALES[:, None, None]
        error = np.linalg.norm(unit - unit[0], axis=(1, 2)) / np.linalg.norm(unit[0])
        assert error.max() < 1e-5, error
    if isinstance(gradient, Implicit):
        exact = adjoint(w, x, z[0], lambda j, v: np.linalg.solve(np.eye(6) - j.T, v))[1]
        np.testing.assert_allclose(dx / SCALES[:, None, None], np.broadcast_to(exact, dx.shape), rtol=2e-3, atol=1e-4)
