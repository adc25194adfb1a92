"""The equilibrium library: solvers, gradients, Jacobian tools. It needs jax, and flax.nnx for `Equilibrium` alone."""

from deq_flax.equilibrium.correction import fixed_point_correction_loss
from deq_flax.equilibrium.fixed_point import fixed_point
from deq_flax.equilibrium.gradients import (
    GRADIENTS,
    Gradient,
    Implicit,
    JacobianFree,
    Neumann,
    PhantomGradient,
    Reversible,
    Shine,
    Unroll,
    backward_probe,
)
from deq_flax.equilibrium.jacobian import jacobian_loss, spectral_radius
from deq_flax.equilibrium.layer import Equilibrium
from deq_flax.equilibrium.normalisation import spectral_normalised
from deq_flax.equilibrium.solution import Solution, Solver, SolverStats
from deq_flax.equilibrium.solvers import ADJOINT_SOLVERS, GMRES, SOLVERS, Anderson, Broyden, Picard
