"""Solvers, one file each. A new one is a frozen dataclass with `init` and `step`, and a line in this table."""

from collections.abc import Callable

from deq_flax.equilibrium.solution import Solver
from deq_flax.equilibrium.solvers.anderson import Anderson
from deq_flax.equilibrium.solvers.broyden import Broyden
from deq_flax.equilibrium.solvers.picard import Picard

SOLVERS: dict[str, Callable[..., Solver]] = {"picard": Picard, "anderson": Anderson, "broyden": Broyden}
