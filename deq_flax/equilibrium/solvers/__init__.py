"""Solvers, one file each. A new one derives from `Solver`, with `init` and `step`, and gets a line in this table.

`GMRES` solves linear equations only, so it is for `Implicit(solver=...)` and stands apart.
"""

from deq_flax.equilibrium.solution import Solver
from deq_flax.equilibrium.solvers.anderson import Anderson
from deq_flax.equilibrium.solvers.broyden import Broyden
from deq_flax.equilibrium.solvers.gmres import GMRES
from deq_flax.equilibrium.solvers.picard import Picard

SOLVERS: dict[str, type[Solver]] = {"picard": Picard, "anderson": Anderson, "broyden": Broyden}
ADJOINT_SOLVERS: dict[str, type[Solver] | type[GMRES]] = {**SOLVERS, "gmres": GMRES}
