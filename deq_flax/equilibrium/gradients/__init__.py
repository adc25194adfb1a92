"""How a fixed point is differentiated, one file for each way. A new one is a frozen dataclass and a line in the table.

A gradient is an object called with (f, z0, solver, max_steps, probe). It returns a `Solution` whose value is differentiable
as it says; statistics carry no gradient. f is a function of the state alone: what it closes over, parameters, inputs, traced
values of any kind, is what gets differentiated. Except for `Unroll` and `Reversible`, which are iterations of their own, the
value is the solver's, whichever way it is differentiated.

| | gradient | modes | cost of the gradient | memory |
|---|---|---|---|---|
| `Implicit` | exact at z* | all | one linear solve | one evaluation |
| `Neumann` | truncated series | all | `terms` products | one evaluation |
| `JacobianFree` | its first term | all | one product | one evaluation |
| `PhantomGradient` | of a few damped steps | all | `steps` evaluations | `steps` evaluations |
| `Shine` | by the forward solver's inverse | reverse | one product | one evaluation, the solver's history |
| `Reversible` | exact, of the iteration | reverse, HVP | the iteration again | one evaluation, a state in 4 steps |
| `Unroll` | exact, of the iteration | all | the iteration again | all evaluations; with remat, all states |
"""

from deq_flax.equilibrium.gradients.base import Gradient, Map, backward_probe
from deq_flax.equilibrium.gradients.implicit import Implicit
from deq_flax.equilibrium.gradients.neumann import JacobianFree, Neumann
from deq_flax.equilibrium.gradients.phantom import PhantomGradient
from deq_flax.equilibrium.gradients.reversible import Reversible
from deq_flax.equilibrium.gradients.shine import Shine
from deq_flax.equilibrium.gradients.unroll import Unroll

GRADIENTS: dict[str, type[Gradient]] = {
    "implicit": Implicit,
    "neumann": Neumann,
    "jacobian_free": JacobianFree,
    "phantom": PhantomGradient,
    "shine": Shine,
    "reversible": Reversible,
    "unroll": Unroll,
}
