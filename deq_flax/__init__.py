"""Deep equilibrium models in JAX."""

from deq_flax.equilibrium import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    Picard,
    Solution,
    SolverStats,
    Unroll,
    backward_probe,
    fixed_point,
    jacobian_loss,
    spectral_radius,
)
