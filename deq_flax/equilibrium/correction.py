"""Fixed-point correction: a loss on iterates before the equilibrium."""

from collections.abc import Callable
from typing import Any

import jax

from deq_flax.equilibrium.solution import Solution


def fixed_point_correction_loss(loss: Callable[[Any], jax.Array], solution: Solution, *, gamma: float = 0.8) -> jax.Array:
    """Return the loss at the equilibrium plus that at recorded iterates (Bai et al. 2022, section 4.3), a scalar.

    sum_{i=1..n} gamma^{n-i} loss(z_i), where z_n is the solution's value and the others its trajectory, in order. Iterates
    carry an inexact gradient, see `fixed_point`: they train f to come close early.

    >>> solver = Anderson(trajectory_steps=(4, 8))
    >>> total = fixed_point_correction_loss(lambda z: jnp.mean((z - y) ** 2), fixed_point(f, z0, x, solver=solver))

    Args:
      loss: state to scalar.
      solution: solution by a solver with `trajectory_steps`.
      gamma: factor by which the weight falls from an iterate to the one before; 1 weighs all equally.

    Raises:
      ValueError: the solution has no trajectory.
    """
    if solution.trajectory is None:
        raise ValueError("fixed_point_correction_loss needs a trajectory: give the solver trajectory_steps=(...)")
    count = jax.tree.leaves(solution.trajectory)[0].shape[0]
    total = loss(solution.value)
    for i in range(count):
        total = total + gamma ** (count - i) * loss(jax.tree.map(lambda leaf, i=i: leaf[i], solution.trajectory))
    return total
