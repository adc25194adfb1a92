"""`fixed_point`: the library in one function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deq_flax.equilibrium.gradients import Gradient, Implicit
from deq_flax.equilibrium.solution import Solution, Solver
from deq_flax.equilibrium.solvers.broyden import Broyden
from deq_flax.equilibrium.state import check_map, check_state


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    max_steps: jax.Array | int | None = None,
    probe: jax.Array | None = None,
) -> Solution:
    """Solve z = f(z, *args) and make the answer differentiable.

    >>> W = 0.3 * jax.random.normal(jax.random.key(0), (8, 8)) / 8**0.5
    >>> x = jnp.ones((2, 8))
    >>> sol = fixed_point(lambda z, x: jnp.tanh(z @ W + x), jnp.zeros_like(x), x)
    >>> sol.value.shape, bool(sol.stats.converged.all())
    ((2, 8), True)

    Args:
      f: called as f(z, *args); returns a pytree with the structure, shapes and dtypes of z. It may close over traced
        values and modules: they are differentiated like `args`.
      z0: initial guess: a pytree of real floating arrays that share a leading batch axis, (B, ...).
      *args: pytrees, handed to f as they are.
      solver: how to find the fixed point; default `Broyden()`.
      gradient: how to differentiate it; default `Implicit()`.
      max_steps: a tighter limit on evaluations for this call; may be traced, so that it can change without recompiling.
      probe: `backward_probe()`, when statistics of the adjoint solve are wanted.

    Returns:
      `Solution(value, stats)`. Not converging is not an error: see `stats.converged`.

    Raises:
      ValueError: z0 is not such a pytree, or f returns something unlike z. Nothing has been solved then.
    """
    check_state(z0)
    z0 = jax.tree.map(jnp.asarray, z0)

    def map_(z: Any) -> Any:
        return f(z, *args)

    check_map(map_, z0)
    return (gradient or Implicit())(map_, jax.lax.stop_gradient(z0), solver or Broyden(), max_steps, probe)
