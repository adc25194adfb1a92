"""The solve of a model: its equilibrium, and the Jacobian loss there."""

from jax import lax

from deq_flax.equilibrium import fixed_point, jacobian_loss


def solve(f, z0, *, jacobian_key, jacobian_through_equilibrium, **options):
    """(`Solution` of z = f(z) from z0, its Jacobian loss or None).

    Args:
      f, z0: as of `fixed_point`.
      jacobian_key: draws the vectors of the Jacobian loss, which is not computed without it.
      jacobian_through_equilibrium: let the Jacobian loss's gradient reach the parameters through the equilibrium too; else the
        equilibrium is held constant in it.
      options: of `fixed_point`, as they are.
    """
    solution = fixed_point(f, z0, **options)
    if jacobian_key is None:
        return solution, None
    z = solution.value if jacobian_through_equilibrium else lax.stop_gradient(solution.value)
    return solution, jacobian_loss(f, z, jacobian_key)
