"""The equilibrium library: solvers, implicit gradients, Jacobian tools. It needs jax, and flax.nnx for `Equilibrium` alone."""

from deq_flax.equilibrium.fixed_point import fixed_point
from deq_flax.equilibrium.gradients import Gradient, Implicit, Unroll, backward_probe
from deq_flax.equilibrium.jacobian import jacobian_loss, spectral_radius
from deq_flax.equilibrium.layer import Equilibrium
from deq_flax.equilibrium.solution import Solution, Solver, SolverStats
from deq_flax.equilibrium.solvers import SOLVERS, Anderson, Broyden, Picard
