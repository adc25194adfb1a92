"""Gradients of a fixed point by name, one file each. A new one is a frozen dataclass and gets a line in the table.

A gradient is called with (f, x0, solver, max_steps, probe) on flat states: f maps (B, N) to (B, N), and x0, (B, N), carries
no gradient. It returns (x, stats), where x, (B, N), is differentiable in what f closes over: parameters, inputs, traced values
of any kind. x is the solver's result for every gradient but `Unroll` and `Reversible`, which are iterations of their own.

| | gradient | modes | cost of the gradient | memory |
|---|---|---|---|---|
| `Implicit` | exact at z* | all | one linear solve | one evaluation |
| `Neumann` | truncated series | all | `terms` products | one evaluation |
| `JacobianFree` | first term of the series | all | one product | one evaluation |
| `PhantomGradient` | of a few relaxed steps | all | `steps` evaluations | `steps` evaluations |
| `SHINE` | by the forward solver's inverse | reverse | one product | one evaluation, the solver's history |
| `Reversible` | exact, of the iteration | reverse, HVP | the iteration again | one evaluation, two states in 8 steps |
| `Unroll` | exact, of the iteration | all | the iteration again | all evaluations; with remat, all states |
| `Unroll(last=)` | of the last steps | all | the last steps again | the last evaluations; with remat, states |
"""

from deq_flax.equilibrium.gradients.base import Gradient
from deq_flax.equilibrium.gradients.implicit import Implicit, backward_probe
from deq_flax.equilibrium.gradients.neumann import JacobianFree, Neumann
from deq_flax.equilibrium.gradients.phantom import PhantomGradient
from deq_flax.equilibrium.gradients.reversible import Reversible
from deq_flax.equilibrium.gradients.shine import SHINE
from deq_flax.equilibrium.gradients.unroll import Unroll

GRADIENTS: dict[str, type[Gradient]] = {
    "implicit": Implicit,
    "neumann": Neumann,
    "jacobian_free": JacobianFree,
    "phantom": PhantomGradient,
    "shine": SHINE,
    "reversible": Reversible,
    "unroll": Unroll,
}
"""Name in a config -> class, whose fields are its options."""
