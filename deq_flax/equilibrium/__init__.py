"""The equilibrium library: solvers, gradients, Jacobian tools. It needs jax, and flax.nnx for `Equilibrium` alone."""

from deq_flax.equilibrium.correction import fixed_point_correction_loss
from deq_flax.equilibrium.fixed_point import OnFailure, fixed_point
from deq_flax.equilibrium.gradients import (
    GRADIENTS,
    SHINE,
    Gradient,
    Implicit,
    JacobianFree,
    Neumann,
    PhantomGradient,
    Reversible,
    Unroll,
    backward_probe,
)
from deq_flax.equilibrium.jacobian import jacobian_loss, spectral_radius
from deq_flax.equilibrium.layer import Equilibrium
from deq_flax.equilibrium.linear import GMRES, LinearSolver
from deq_flax.equilibrium.loop import Solver, StopMode
from deq_flax.equilibrium.normalization import spectral_normalized
from deq_flax.equilibrium.queue import fixed_point_queue
from deq_flax.equilibrium.restarts import fixed_point_restarts, path_independence
from deq_flax.equilibrium.solution import Solution, Solve, SolverStats
from deq_flax.equilibrium.solvers import SOLVERS, Anderson, Broyden, Picard

__all__ = [
    "GMRES",
    "GRADIENTS",
    "SHINE",
    "SOLVERS",
    "Anderson",
    "Broyden",
    "Equilibrium",
    "Gradient",
    "Implicit",
    "JacobianFree",
    "LinearSolver",
    "Neumann",
    "OnFailure",
    "PhantomGradient",
    "Picard",
    "Reversible",
    "Solution",
    "Solve",
    "Solver",
    "SolverStats",
    "StopMode",
    "Unroll",
    "backward_probe",
    "fixed_point",
    "fixed_point_correction_loss",
    "fixed_point_queue",
    "fixed_point_restarts",
    "jacobian_loss",
    "path_independence",
    "spectral_normalized",
    "spectral_radius",
]
