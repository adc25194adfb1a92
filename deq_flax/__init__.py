"""Deep equilibrium models in JAX."""

from deq_flax.equilibrium import (
    GMRES,
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    JacobianFree,
    Neumann,
    PhantomGradient,
    Picard,
    Reversible,
    Shine,
    Solution,
    SolverStats,
    Unroll,
    backward_probe,
    fixed_point,
    fixed_point_correction_loss,
    jacobian_loss,
    spectral_normalised,
    spectral_radius,
)
