"""The Jacobian of f at a state: a loss that keeps it small, and its spectral radius."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.fixed_point import flattener
from deq_flax.equilibrium.shards import cast, settled, varying
from deq_flax.equilibrium.solution import norm


def jacobian_loss(
    f: Callable[[Any], Any], z: Any, key: jax.Array | None = None, *, samples: int = 1, vectors: Any = None
) -> jax.Array:
    """Estimate the squared Frobenius norm of the Jacobian per element of z, by Hutchinson's method (Bai et al. 2021, eq. 5).

    The mean of |v^T J|^2 / (number of elements of z) over draws of v, standard normal: a scalar. It is differentiable in what f
    closes over, and in z: pass `jax.lax.stop_gradient(z)` to hold the equilibrium constant, as the authors' training does, or z
    itself to differentiate through it too.

    Args:
      f: state to state.
      z: state at which the Jacobian is taken, usually the equilibrium.
      key: random key for the draws. Not needed with `vectors`.
      samples: number of draws.
      vectors: an explicit v, a pytree like z, instead of random ones.

    Raises:
      ValueError: neither key nor vectors is given.
    """
    fz, pullback = jax.vjp(f, z)
    count = sum(leaf.size for leaf in jax.tree.leaves(z))

    def once(v: Any) -> jax.Array:
        (vj,) = pullback(jax.tree.map(lambda leaf, like: cast(leaf, varying(like)), v, fz))
        return sum(jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) for x in jax.tree.leaves(vj)) / count

    if vectors is not None:
        return once(vectors)
    if key is None:
        raise ValueError("jacobian_loss needs a random key, or explicit vectors")
    keys = jax.random.split(key, samples)
    if samples == 1:
        return once(_normal_like(z, keys[0]))
    return jnp.mean(jax.lax.map(lambda k: once(_normal_like(z, k)), keys))


def spectral_radius(f: Callable[[Any], Any], z: Any, key: jax.Array, *, steps: int = 100) -> jax.Array:
    """Estimate the spectral radius of the Jacobian of f at z, (B,), by power iteration with Jacobian-vector products.

    If it is below 1 at an equilibrium, Picard iteration converges near it. The estimate is the growth of the norm, a geometric
    mean over the second half of the steps: valid for non-symmetric Jacobians and complex eigenvalues too, where a Rayleigh
    quotient is not.

    Args:
      f: state to state, each sample by itself.
      z: state at which the Jacobian is taken, usually the equilibrium.
      key: random key of the starting vector.
      steps: number of Jacobian-vector products.

    Raises:
      ValueError: steps is less than 2.
    """
    if steps < 2:
        raise ValueError(f"spectral_radius: steps must be at least 2, not {steps}")
    flatten, unflatten = flattener(z)
    _, push = jax.linearize(f, z)
    tiny = jnp.finfo(flatten(z).dtype).tiny

    def body(v: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        w = flatten(push(unflatten(v)))
        growth = norm(w)
        return w / jnp.maximum(growth, tiny)[:, None], growth

    v = flatten(_normal_like(z, key))
    start = settled(lambda v: body(v, None)[0], cast(v / norm(v)[:, None], varying(z)))
    _, growth = jax.lax.scan(body, start, None, length=steps)
    return jnp.exp(jnp.mean(jnp.log(jnp.maximum(growth[steps // 2 :], tiny)), axis=0))


def _normal_like(z: Any, key: jax.Array) -> Any:
    leaves, structure = jax.tree.flatten(z)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])
