"""How an equilibrium model is solved and trained over time: the section `deq` of a config, shared by all tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_flax.equilibrium import (
    ADJOINT_SOLVERS,
    SOLVERS,
    Gradient,
    Implicit,
    PhantomGradient,
    Reversible,
    Solver,
    Unroll,
    fixed_point,
    spectral_radius,
)
from deq_flax.equilibrium.solution import SolverStats, StopMode
from deq_flax.errors import UserError
from deq_flax.task import Controls, Metrics, Phase, average

GRADIENTS = ("implicit", "phantom", "reversible", "unroll")
"""Those with options in a config."""

UNSOLVED = 0.1
"""The relative residual above which a member counts as unsolved: it diverged, f gave something that is not finite, or the limit
on evaluations is far too low."""


@dataclass(frozen=True, kw_only=True)
class EquilibriumRecipe:
    """Solvers, and what happens at which training step. Everything is a function of (seed, step): runs resume exactly."""

    solver: str
    tol: float
    max_steps: int
    """Evaluations of f in a forward solve."""
    stop: StopMode
    backward_solver: str
    """Any of the adjoint solvers."""
    backward_tol: float
    backward_max_steps: int
    jacobian_weight: float
    jacobian_frequency: float
    """Probability that a step adds the Jacobian loss."""
    jacobian_increment: float
    """Added to the weight ..."""
    jacobian_increment_every: int
    """... after each so many steps past pretraining; 0 is never."""
    jacobian_stop: int
    """The step from which on there is no Jacobian loss; 0 is never."""
    jacobian_through_equilibrium: bool
    max_steps_jitter: int
    """A step's limit is drawn from max_steps - jitter ... max_steps."""
    pretrain_steps: int
    """Steps of unrolled pretraining."""
    pretrain_layers: int
    """Evaluations of f in it."""
    seed: int
    gradient: str = "implicit"
    """How an equilibrium is differentiated: 'implicit', by the adjoint solver; 'phantom', through a few damped steps;
    'reversible': of an iteration that is run backward again, which takes the place of the solver's; 'unroll': there is no solve
    in training, but `max_steps` evaluations, differentiated with rematerialisation."""
    phantom_steps: int = 5
    phantom_damping: float = 0.5
    pretrain_jacobian_weight: float = 0.0
    """Weight of a Jacobian loss in pretraining, with the same frequency; 0 is none."""
    memory: int = 0
    """Iterates that Anderson's method combines, and steps that Broyden's keeps, both ways; 0: 6 and all."""

    def __post_init__(self):
        for name, known in ((self.solver, SOLVERS), (self.backward_solver, ADJOINT_SOLVERS)):
            if name not in known:
                raise UserError(f"unknown solver {name!r} in section deq; known: {', '.join(known)}")
        if not 0 <= self.jacobian_frequency <= 1:
            raise UserError(f"deq.jacobian_frequency is a probability, not {self.jacobian_frequency}")
        if not 0 <= self.max_steps_jitter < self.max_steps:
            raise UserError(f"deq.max_steps_jitter must be at least 0 and below max_steps, not {self.max_steps_jitter}")
        if self.gradient not in GRADIENTS:
            raise UserError(f"unknown deq.gradient {self.gradient!r}; known: {', '.join(GRADIENTS)}")
        not_negative = "jacobian_weight jacobian_increment_every jacobian_stop pretrain_steps pretrain_jacobian_weight memory"
        for name in not_negative.split():
            if getattr(self, name) < 0:
                raise UserError(f"deq.{name} must not be negative, but is {getattr(self, name)}")
        try:
            _ = self.forward_solver, self.gradient_of(Phase()), self.gradient_of(Phase(unrolled=True))
        except ValueError as error:
            raise UserError(f"section deq: {error}") from error

    @property
    def forward_solver(self) -> Solver:
        return self._solver(self.solver, self.tol, self.max_steps)

    def gradient_of(self, phase: Phase | None) -> Gradient:
        """How a phase differentiates; evaluation, None, solves."""
        if phase is not None and phase.unrolled:
            return Unroll(self.pretrain_layers)
        if phase is not None and self.gradient == "unroll":
            return Unroll(self.max_steps, remat=True)
        if self.gradient == "phantom":
            return PhantomGradient(steps=self.phantom_steps, damping=self.phantom_damping)
        if self.gradient == "reversible":
            return Reversible()
        return Implicit(solver=self._solver(self.backward_solver, self.backward_tol, self.backward_max_steps))

    def _solver(self, name: str, tol: float, max_steps: int) -> Any:
        if name not in SOLVERS:
            return ADJOINT_SOLVERS[name](tol=tol, max_steps=max_steps)  # it stops by the relative residual alone
        kept: dict[str, Any] = {"memory": self.memory} if self.memory and name != "picard" else {}
        return SOLVERS[name](tol=tol, max_steps=max_steps, stop=self.stop, **kept)

    def model_options(
        self, phase: Phase | None, controls: Controls | None, key: Any, probe: jax.Array | None
    ) -> dict[str, Any]:
        """How a model is to be called, but for its data; arguments as of `Task.loss`."""
        return dict(
            solver=self.forward_solver,
            gradient=self.gradient_of(phase),
            key=key,
            max_steps=None if controls is None else controls.max_steps,
            probe=probe,
            jacobian_key=jax.random.fold_in(key, 1) if phase is not None and phase.jacobian_loss else None,
            jacobian_through_equilibrium=self.jacobian_through_equilibrium,
        )

    def spectral_radius(self, f: Callable[[Any], Any], z0: Any, key: Any) -> jax.Array:
        """(B,) at the equilibria of z = f(z) that the forward solver finds from z0."""
        return spectral_radius(f, fixed_point(f, z0, solver=self.forward_solver).value, key)

    def phase(self, step: int) -> Phase:
        unrolled = step < self.pretrain_steps
        weight = self.pretrain_jacobian_weight if unrolled else self.jacobian_weight
        wanted = weight > 0 and not (self.jacobian_stop and step >= self.jacobian_stop)
        return Phase(unrolled=unrolled, jacobian_loss=wanted and self._random(step).random() < self.jacobian_frequency)

    def controls(self, step: int) -> Controls:
        random = self._random(step)
        random.random()  # the phase's draw
        jitter = random.integers(0, self.max_steps_jitter + 1)
        past = max(0, step - self.pretrain_steps)
        increments = past // self.jacobian_increment_every if self.jacobian_increment_every else 0
        weight = self.jacobian_weight + self.jacobian_increment * increments
        if step < self.pretrain_steps and self.pretrain_jacobian_weight:
            weight = self.pretrain_jacobian_weight
        return Controls(
            max_steps=np.int32(self.max_steps - jitter),
            jacobian_weight=np.float32(weight),
        )

    def _random(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))


def solver_metrics(stats: SolverStats) -> Metrics:
    """Evaluations of f, the residual of the member that is worst off, and the share of members that ended above UNSOLVED."""
    unsolved_B = ~(stats.relative_residual < UNSOLVED)  # nor is NaN less
    return {
        "forward_nfe": average(stats.nfe),
        "forward_residual": average(jnp.max(stats.relative_residual)),
        "forward_unsolved": average(jnp.sum(unsolved_B, dtype=jnp.float32), unsolved_B.size),
    }


def add_solver(
    loss: jax.Array, metrics: Metrics, stats: SolverStats, jacobian_loss: jax.Array | None, controls: Controls | None
) -> tuple[jax.Array, Metrics]:
    """The loss with the Jacobian loss of phases that have it, and the metrics with what the solver tells."""
    metrics = metrics | solver_metrics(stats)
    if jacobian_loss is not None and controls is not None:
        loss = loss + controls.jacobian_weight * jacobian_loss
        metrics["jacobian_loss"] = average(jacobian_loss)
    return loss, metrics


def ordered(metrics: Mapping[str, Any], *first: str) -> dict[str, float]:
    """The metrics that are numbers, those named first, without what did not happen."""
    names = [*first, *(name for name in metrics if name not in first)]
    return without_what_did_not_happen(
        {name: metrics[name] for name in names if name in metrics and not np.ndim(metrics[name])}
    )


def without_what_did_not_happen(summary: dict[str, float]) -> dict[str, float]:
    """`forward_unsolved` is told only where there were such members."""
    return {name: value for name, value in summary.items() if name != "forward_unsolved" or value > 0}
