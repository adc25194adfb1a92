"""Phases of training: how each step solves and differentiates an equilibrium (section `deq` of a config).

The phase of a step, and the scalars that change from step to step, are functions of the seed and the step's number alone,
so that a resumed run repeats them exactly.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deq_flax.equilibrium import (
    GRADIENTS,
    SHINE,
    SOLVERS,
    Broyden,
    Gradient,
    Implicit,
    Solution,
    Solver,
    SolverStats,
    Unroll,
    backward_probe,
    fixed_point,
    fixed_point_queue,
    jacobian_loss,
)
from deq_flax.errors import UserError
from deq_flax.options import choose, make
from deq_flax.task import Metrics, average
from deq_flax.train.consistency import consistency_loss, consistency_probe, with_loss

UNSOLVED = 0.1
"""The relative residual above which a sample counts as unsolved: it diverged, f is not finite there, or the limit on
evaluations is far too low."""


@dataclass(frozen=True, kw_only=True)
class DEQOptions:
    """Section `deq` of a config: the equilibrium's solver and gradient, and how training approaches it."""

    solver: str = "broyden"
    """Forward solver: {SOLVERS}; gmres solves linear equations only, as backward_solver."""
    tol: float = 1e-3
    """Residual at which a sample's forward solve stops."""
    max_steps: int = 30
    """Largest number of evaluations of f in a forward solve."""
    eval_max_steps: int = 0
    """Largest number of evaluations of f in a forward solve of evaluation; 0: max_steps."""
    eval_unrolled: bool = False
    """Evaluate by the unrolled iteration, to its last iterate, instead of solving; for gradient unroll."""
    stop: Literal["relative", "absolute"] = "relative"
    """Residual that tol is compared with: relative, ||f(z) - z|| / ||f(z)||, or absolute, ||f(z) - z||."""
    solver_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options that only the forward solver has, such as memory=10 of anderson and broyden."""
    gradient: str = "implicit"
    """Differentiation of the equilibrium: {GRADIENTS}."""
    gradient_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options that only the gradient has, such as steps=5 and relaxation=0.5 of phantom; unroll takes max_steps steps by
    default, of which last=K differentiates the last K."""
    backward_solver: str = "broyden"
    """Solver of the adjoint equation of the implicit gradient: {SOLVERS}."""
    backward_tol: float = 1e-3
    """Relative residual at which a sample's adjoint solve stops."""
    backward_max_steps: int = 30
    """Largest number of vector-Jacobian products in an adjoint solve."""
    backward_solver_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options that only the adjoint solver has."""
    jacobian_weight: float = 0.0
    """Weight of the Jacobian loss, the regularizer of the Jacobian at the equilibrium; 0: none."""
    jacobian_frequency: float = 0.0
    """Probability that a step adds the Jacobian loss."""
    jacobian_increment: float = 0.1
    """Increase of jacobian_weight after every jacobian_increment_every steps."""
    jacobian_increment_every: int = 0
    """Steps after pretraining between increases of jacobian_weight; 0: it never increases."""
    jacobian_stop: int = 0
    """First step without a Jacobian loss; 0: it never stops."""
    jacobian_through_equilibrium: bool = False
    """Differentiate the Jacobian loss through the equilibrium too, which otherwise is held constant."""
    consistency_weight: float = 0.0
    """Weight of the consistency loss, which trains f to map early iterates straight to the equilibrium; 0: none."""
    consistency_steps: tuple[int, ...] = (0, 1, 2, 4)
    """Steps of the forward solve whose iterates the consistency loss takes; 0 is the initial guess."""
    max_steps_jitter: int = 0
    """Each training step draws its limit on evaluations from max_steps - max_steps_jitter to max_steps."""
    pretrain_steps: int = 0
    """First training steps in which f is unrolled instead of solved for."""
    pretrain_layers: int = 2
    """Evaluations of f in an unrolled pretraining step."""
    pretrain_jacobian_weight: float = 0.0
    """Weight of the Jacobian loss in pretraining, with the same frequency; 0: none."""

    def __post_init__(self):
        if not 0 <= self.jacobian_frequency <= 1:
            raise UserError(f"deq.jacobian_frequency is a probability, not {self.jacobian_frequency}")
        if not 0 <= self.max_steps_jitter < self.max_steps:
            raise UserError(f"deq.max_steps_jitter must be at least 0 and below max_steps, not {self.max_steps_jitter}")
        for name in [
            "eval_max_steps",
            "consistency_weight",
            "jacobian_weight",
            "jacobian_increment_every",
            "jacobian_stop",
            "pretrain_steps",
            "pretrain_jacobian_weight",
        ]:
            if getattr(self, name) < 0:
                raise UserError(f"deq.{name} must not be negative, but is {getattr(self, name)}")
        solver, gradient, _ = self.training_solver(), self.training_gradient(), self.pretraining_gradient()
        if isinstance(gradient, SHINE) and not isinstance(solver, Broyden):
            raise UserError(
                f"deq.gradient shine shares the inverse of Broyden's method: set deq.solver to broyden, not {self.solver}"
            )
        if self.eval_unrolled and self.gradient != "unroll":
            raise UserError(f"deq.eval_unrolled is for deq.gradient unroll, not {self.gradient}: set it to False")

    def forward_solver(self) -> Solver:
        """The solver of the forward pass. UserError: there is no such solver, or an option of it is wrong."""
        options = {"tol": self.tol, "max_steps": self.max_steps, "stop": self.stop}
        solver = _solver(self.solver, options, self.solver_options, "deq.solver_options")
        if not isinstance(solver, Solver):
            raise UserError(f"deq.solver {self.solver!r} solves linear equations only: use it as deq.backward_solver")
        return solver

    def training_solver(self) -> Solver:
        """The solver of training: that of the forward pass, with the iterates of the consistency loss. UserError likewise."""
        solver = self.forward_solver()
        if self.consistency_weight == 0:
            return solver
        try:
            return dataclasses.replace(solver, trajectory_steps=self.consistency_steps)
        except ValueError as error:
            raise UserError(f"deq.consistency_steps: {error}") from error

    def evaluation_solver(self) -> Solver:
        """The solver of evaluation: that of the forward pass with the limit of evaluation. UserError as of `forward_solver`."""
        return dataclasses.replace(self.forward_solver(), max_steps=self.eval_max_steps or self.max_steps)

    def training_gradient(self) -> Gradient:
        """The gradient of an equilibrium training step. UserError as of `forward_solver`."""
        return self._gradient(self.gradient, self.gradient_options)

    def evaluation_gradient(self) -> Gradient:
        """The gradient that evaluation is given: it decides between solving and unrolling, nothing is differentiated."""
        gradient = self.training_gradient()
        if not isinstance(gradient, Unroll):
            return gradient
        if self.eval_unrolled:
            return dataclasses.replace(gradient, steps=self.eval_max_steps or self.max_steps, last=1)
        return self._gradient("implicit", {})

    def pretraining_gradient(self) -> Gradient:
        """The gradient of an unrolled pretraining step."""
        return self._gradient("unroll", {"steps": self.pretrain_layers, "remat": False})

    def _gradient(self, name: str, options: Mapping[str, Any]) -> Gradient:
        cls = choose(GRADIENTS, name, "deq.gradient")
        given = {"implicit": {"solver": self._backward_solver()}, "unroll": {"key": None}}.get(name, {})
        usual = {"steps": self.max_steps, "remat": True} if name == "unroll" else {}
        return make(cls, usual | dict(options), "deq.gradient_options", **given)

    def _backward_solver(self) -> Any:
        options = {"tol": self.backward_tol, "max_steps": self.backward_max_steps, "stop": "relative"}
        return _solver(self.backward_solver, options, self.backward_solver_options, "deq.backward_solver_options")


def _solver(name: str, options: Mapping[str, Any], own: Mapping[str, Any], where: str) -> Any:
    cls = choose(SOLVERS, name, where.removesuffix("_options"))
    known = {field.name for field in dataclasses.fields(cls)}
    return make(cls, own, where, **{key: value for key, value in options.items() if key in known})


class StepScalars(NamedTuple):
    """Scalars that change from step to step within a phase. They are traced: a new value never recompiles. None: not used."""

    max_steps: Any = None
    """int32: limit on the evaluations of this step's forward solve."""
    jacobian_weight: Any = None
    """float32: weight of the Jacobian loss."""


class Probes(NamedTuple):
    """Arrays of zeros. The gradient with respect to them reports what a step computes apart from its loss; None: no report."""

    backward: jax.Array | None = None
    """`equilibrium.backward_probe`, of adjoint solves."""
    consistency: jax.Array | None = None
    """`consistency_probe`, of the consistency loss."""


_NO_SCALARS, _NO_PROBES = StepScalars(), Probes()


@dataclass(frozen=True)
class Phase:
    """One kind of step. Static and hashable: each distinct phase is compiled once."""

    name: str
    """Name in the progress lines."""
    solver: Solver | None = None
    """Forward solver; None: the model has no equilibrium."""
    gradient: Gradient | None = None
    jacobian_loss: bool = False
    """Add the Jacobian loss."""
    jacobian_through_equilibrium: bool = False
    consistency_weight: float = 0.0
    """Weight of the consistency loss on the solver's trajectory; 0: none."""
    limited: bool = True
    """Apply the step's limit on evaluations, not the solver's own alone."""
    slots: int = 0
    """Solve each batch through a queue with as many slots; 0: all samples at once."""

    def __str__(self) -> str:
        return self.name + " with Jacobian loss" * self.jacobian_loss

    def at_start(self) -> "Phase":
        """This phase without a solve: the state is the initial guess, evaluated once for its residual."""
        if self.solver is None:
            return self
        return dataclasses.replace(self, solver=self.solver.with_limits(max_steps=1), gradient=Implicit(), limited=False)

    def solve(
        self, scalars: StepScalars = _NO_SCALARS, *, key: jax.Array | None = None, probes: Probes = _NO_PROBES
    ) -> "PhaseSolve | None":
        """The argument `solve` of a model's call in this phase. `key` draws the vectors of the Jacobian loss, and the noise."""
        gradient = self.gradient
        if self.solver is None or gradient is None:
            return None
        if isinstance(gradient, Unroll) and gradient.noise and key is not None:
            gradient = dataclasses.replace(gradient, key=jax.random.fold_in(key, 2))
        jacobian_key = jax.random.fold_in(key, 1) if self.jacobian_loss and key is not None else None
        limit = scalars.max_steps if self.limited else None
        through = self.jacobian_through_equilibrium
        return PhaseSolve(self.solver, gradient, limit, probes, jacobian_key, through, self.slots, self.consistency_weight)


@dataclass(frozen=True, eq=False)
class PhaseSolve:
    """Solve z = f(z) as a phase does: `equilibrium.solution.Solve`."""

    solver: Solver
    gradient: Gradient
    max_steps: jax.Array | int | None = None
    probes: Probes = _NO_PROBES
    jacobian_key: jax.Array | None = None
    """Random key of the Jacobian loss; None: no such loss."""
    jacobian_through_equilibrium: bool = False
    slots: int = 0
    consistency_weight: float = 0.0

    def __call__(self, f: Callable[..., Any], z0: Any, *inputs: Any) -> tuple[Solution, jax.Array | None]:
        """The solution from the initial guess z0, and the Jacobian loss there, a scalar, or None."""
        if self.slots:
            if not inputs:
                raise UserError("eval.slots: this model solves all samples of a batch at once; set it to 0")
            if isinstance(self.gradient, Unroll):
                raise UserError("eval.slots: an unrolled iteration does not stop; set it to 0, or deq.eval_unrolled to False")
            queue = fixed_point_queue(f, z0, *inputs, slots=self.slots, solver=self.solver, max_steps=self.max_steps)
            return queue, None
        solution = fixed_point(
            f, z0, *inputs, solver=self.solver, gradient=self.gradient, max_steps=self.max_steps, probe=self.probes.backward
        )
        if self.consistency_weight:
            loss = consistency_loss(lambda z: f(z, *inputs), solution.trajectory, solution.value)
            value = with_loss(solution.value, loss, self.consistency_weight, self.probes.consistency)
            solution = dataclasses.replace(solution, value=value)
        if self.jacobian_key is None:
            return solution, None
        z = solution.value if self.jacobian_through_equilibrium else jax.lax.stop_gradient(solution.value)
        return solution, jacobian_loss(lambda z: f(z, *inputs), z, self.jacobian_key)


class Phases:
    """The phases of a model without an equilibrium: all training steps are alike."""

    evaluation = Phase("evaluation")

    def phase(self, step: int) -> Phase:
        """The phase of training step `step`, counted from 0."""
        return Phase("explicit layers")

    def kinds(self) -> list[Phase]:
        """All phases that a run can have, one of its last step first: each is a program of its own."""
        return [self.phase(0)]

    def scalars(self, step: int) -> StepScalars:
        """The scalars of training step `step`."""
        return StepScalars()


class EquilibriumPhases(Phases):
    """The phases of an equilibrium model: unrolled pretraining, then the equilibrium, some steps with a Jacobian loss.

    Evaluation solves, for `unroll` too, unless `eval_unrolled` asks for the unrolled iteration.
    """

    def __init__(self, deq: DEQOptions, seed: int):
        self._deq, self._seed = deq, seed
        gradient, through = deq.training_gradient(), deq.jacobian_through_equilibrium
        # A number of steps that never changes is a constant of the program, not an argument.
        limited = deq.max_steps_jitter > 0 or not isinstance(gradient, Unroll)
        self._training = Phase(
            "equilibrium",
            deq.training_solver(),
            gradient,
            jacobian_through_equilibrium=through,
            consistency_weight=deq.consistency_weight,
            limited=limited,
        )
        self._pretraining = dataclasses.replace(
            self._training,
            name="unrolled pretraining",
            solver=deq.forward_solver(),
            gradient=deq.pretraining_gradient(),
            consistency_weight=0.0,
            limited=False,
        )
        self.evaluation = Phase("evaluation", deq.evaluation_solver(), deq.evaluation_gradient())

    def phase(self, step: int) -> Phase:
        deq, pretraining = self._deq, step < self._deq.pretrain_steps
        weight = deq.pretrain_jacobian_weight if pretraining else deq.jacobian_weight
        wanted = weight > 0 and not (deq.jacobian_stop and step >= deq.jacobian_stop)
        phase = self._pretraining if pretraining else self._training
        return dataclasses.replace(phase, jacobian_loss=wanted and self._draws(step)[0] < deq.jacobian_frequency)

    def kinds(self) -> list[Phase]:
        deq = self._deq
        found = self._regularized(self._training, deq.jacobian_weight)
        return found + (self._regularized(self._pretraining, deq.pretrain_jacobian_weight) if deq.pretrain_steps else [])

    def _regularized(self, phase: Phase, weight: float) -> list[Phase]:
        """The phase without the Jacobian loss, with it, or both."""
        deq = self._deq
        wanted = weight > 0 and deq.jacobian_frequency > 0
        always = wanted and deq.jacobian_frequency == 1 and not deq.jacobian_stop
        return [phase] * (not always) + [dataclasses.replace(phase, jacobian_loss=True)] * wanted

    def scalars(self, step: int) -> StepScalars:
        deq, (_, jitter) = self._deq, self._draws(step)
        past = max(0, step - deq.pretrain_steps)
        increments = past // deq.jacobian_increment_every if deq.jacobian_increment_every else 0
        weight = deq.jacobian_weight + deq.jacobian_increment * increments
        if step < deq.pretrain_steps and deq.pretrain_jacobian_weight:
            weight = deq.pretrain_jacobian_weight
        return StepScalars(max_steps=np.int32(deq.max_steps - jitter), jacobian_weight=np.float32(weight))

    def _draws(self, step: int) -> tuple[float, int]:
        """The random numbers of a step: one in [0, 1) that chooses its phase, and what its limit is lowered by."""
        random = np.random.default_rng((self._seed, step))
        return random.random(), int(random.integers(0, self._deq.max_steps_jitter + 1))


def make_phases(deq: DEQOptions | None, *, seed: int = 0) -> Phases:
    """The phases of section `deq`; None: the model has no equilibrium.

    `seed` decides which steps add the Jacobian loss, and their limits on evaluations.
    """
    return Phases() if deq is None else EquilibriumPhases(deq, seed)


def make_probes() -> Probes:
    """The probes of a training step."""
    return Probes(backward_probe(), consistency_probe())


def probe_metrics(report: Probes) -> Metrics:
    """Averages from the gradient of the probes; a step without an adjoint solve or a consistency loss does not count in its."""
    backward, consistency = report
    assert backward is not None and consistency is not None, "they are those of make_probes"
    return {
        "backward_nfe": average(backward[0], backward[2]),
        "backward_residual": average(backward[1], backward[2]),
        "consistency_loss": average(consistency[0], consistency[1]),
    }


def regularized(loss: jax.Array, jacobian_loss: jax.Array | None, scalars: StepScalars) -> jax.Array:
    """The loss plus the weighted Jacobian loss, in the steps that have one."""
    return loss if jacobian_loss is None else loss + scalars.jacobian_weight * jacobian_loss


def solver_metrics(stats: SolverStats | None, jacobian_loss: jax.Array | None) -> Metrics:
    """Evaluations of f, largest residual in the batch, share of samples that ended above UNSOLVED, and the Jacobian loss."""
    metrics: Metrics = {}
    if stats is not None:
        unsolved_B = ~(stats.relative_residual < UNSOLVED)  # NaN counts as unsolved
        metrics |= {
            "forward_nfe": average(stats.nfe),
            "forward_residual": average(jnp.max(stats.relative_residual)),
            "forward_unsolved": average(jnp.sum(unsolved_B, dtype=jnp.float32), unsolved_B.size),
        }
    if jacobian_loss is not None:
        metrics["jacobian_loss"] = average(jacobian_loss)
    return metrics
