"""Solvers by name, one file each. A new one derives from `Solver`, with `init` and `step`, and gets a line in the table.

`GMRES` solves linear equations only: it is for `Implicit(solver=...)`.
"""

from deq_flax.equilibrium.linear import GMRES
from deq_flax.equilibrium.loop import Solver
from deq_flax.equilibrium.solvers.anderson import Anderson
from deq_flax.equilibrium.solvers.broyden import Broyden
from deq_flax.equilibrium.solvers.picard import Picard

SOLVERS: dict[str, type[Solver] | type[GMRES]] = {
    "picard": Picard,
    "anderson": Anderson,
    "broyden": Broyden,
    "gmres": GMRES,
}
"""Name in a config -> class, whose fields are its options. A forward solver must be a subclass of `Solver`."""
