"""Consistency: train f to reach its equilibrium in few evaluations, from every iterate of a solve.

After the consistency distillation of Lin et al. (2026, arXiv:2602.03024), with f itself as the map from an iterate to the
equilibrium: no network is added. f is pulled to the model's own equilibrium, held constant; the loss of the task keeps it good.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

EPSILON = 1e-12
"""Added to the squared norm of the equilibrium."""


def consistency_loss(f: Callable[[Any], Any], iterates: Any, z: Any) -> jax.Array:
    """The mean over samples and iterates of ||f(z_k) - z||^2 / ||z||^2, a scalar. Iterates and z are held constant.

    It trains f to map each iterate of a solve straight to the equilibrium z, so that later solves take fewer evaluations.

    Args:
      f: the map of the equation z = f(z); its parameters get the gradient.
      iterates: a pytree like z with a leading axis for the iterates z_k, as in `Solution.trajectory`.
      z: the equilibrium, a pytree of arrays (B, ...).
    """
    iterates, z = jax.lax.stop_gradient((iterates, z))
    missed = jax.tree.map(lambda after, z: after - z[None], jax.vmap(f)(iterates), z)
    squared_SB = _total([jnp.square(leaf).reshape(*leaf.shape[:2], -1).sum(-1) for leaf in jax.tree.leaves(missed)])
    size_B = _total([jnp.square(leaf).reshape(leaf.shape[0], -1).sum(-1) for leaf in jax.tree.leaves(z)])
    return jnp.mean(squared_SB / (size_B + EPSILON)[None])


def _total(parts: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(parts), axis=0)


def consistency_probe() -> jax.Array:
    """Return zeros (2,) for `with_loss`: the gradient with respect to them is [sum of the losses, number of losses].

    Sums over all losses that shared the probe, so that averages are right with several solves in a step.
    """
    return jnp.zeros(2)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def with_loss(z: Any, loss: jax.Array, weight: float, probe: jax.Array | None = None) -> Any:
    """Return z unchanged; what is differentiated through it gets the gradient of `weight * loss` too, as if that were added.

    A loss that a solve computes thus needs no place in the results of the model; `probe`, from `consistency_probe`, reports it.
    """
    return z


def _with_loss(z: Any, loss: jax.Array, weight: float, probe: jax.Array | None) -> tuple[Any, tuple]:
    return z, (loss, probe)


def _gradient(weight: float, kept: tuple, cotangent: Any) -> tuple:
    loss, probe = kept
    report = None if probe is None else jnp.stack([loss, jnp.ones_like(loss)]).astype(probe.dtype)
    return cotangent, jnp.full_like(loss, weight), report


with_loss.defvjp(_with_loss, _gradient)
