"""What a solve returns, and what a solver is."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import jax

StopMode = Literal["relative", "absolute"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SolverStats:
    """How a solve went, member by member. Every array is a float array, so that it can travel through `custom_root`.

    With r(z) = f(z) - z and norms over everything but the batch axis:
    """

    nfe: jax.Array
    """Scalar: evaluations of f on the batch."""
    steps: jax.Array
    """(B,): the step that gave the returned iterate; 0 is the initial guess. Indexes the traces."""
    relative_residual: jax.Array
    """(B,): ||r(z)|| / ||f(z)|| of the returned iterate."""
    absolute_residual: jax.Array
    """(B,): ||r(z)|| of the returned iterate."""
    converged: jax.Array
    """(B,): 1.0 where the residual of the solver's stop mode is at most its tolerance, else 0.0."""
    relative_trace: jax.Array | None = None
    """(B, max_steps) relative residual of each iterate, padded with the returned one's; None unless asked for."""
    absolute_trace: jax.Array | None = None
    """(B, max_steps), likewise absolute."""
    sampled: jax.Array | None = None
    """(S, B, N) flat iterates that `Solver.sample_steps` asked for. `fixed_point` turns them into `Solution.trajectory`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Solution:
    """A fixed point, or the best iterate found: `stats.converged` tells which."""

    value: Any
    """A pytree like the initial guess."""
    stats: SolverStats
    trajectory: Any = None
    """A pytree like the initial guess with a leading axis for the iterates `Solver.sample_steps`; None unless asked for."""


Solve = Callable[[Callable[[Any], Any], Any], tuple[Solution, jax.Array | None]]
"""(f, z0) -> the solution of z = f(z) from z0, and the Jacobian loss there if one is wanted: how a model is told to solve."""


@dataclass(frozen=True)
class Solver:
    """How to step towards z = f(z). The loop (`loop.solve`) owns evaluating, counting, stopping and keeping the best.

    A solver is a frozen dataclass of Python numbers: hashable, so that it can be a static argument of `jax.jit`. It works on
    flat states (B, N) and never mixes members of the batch. A new one derives from this class, which holds the options that
    all have, and defines `init` and `step`.

    Args:
      tol: a member stops when its residual is at most this.
      max_steps: limit on the evaluations of f.
      stop: whether `tol` is about the 'relative' or the 'absolute' residual; see `SolverStats`.
      trace: record the residual of every iterate.
      sample_steps: iterates to record in `Solution.trajectory`, increasing, each below max_steps; 0 is the initial guess.

    Raises:
      ValueError: an option is out of range.
    """

    tol: float = 1e-6
    max_steps: int = 50
    stop: StopMode = "relative"
    trace: bool = field(default=False, kw_only=True)
    sample_steps: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self):
        name, steps = type(self).__name__, self.sample_steps
        if self.stop not in ("relative", "absolute"):
            raise ValueError(f"{name}: stop must be 'relative' or 'absolute', not {self.stop!r}")
        if not self.tol >= 0:
            raise ValueError(f"{name}: tol must be at least 0, not {self.tol}")
        if self.max_steps < 1:
            raise ValueError(f"{name}: max_steps must be at least 1, not {self.max_steps}")
        if not isinstance(steps, tuple) or list(steps) != sorted({k for k in steps if 0 <= k < self.max_steps}):
            raise ValueError(f"{name}: sample_steps must be a tuple of increasing steps below {self.max_steps}, not {steps!r}")

    def init(self, z: jax.Array) -> Any:
        """The solver's own state for an initial guess z (B, N)."""
        raise NotImplementedError

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """The next iterate (B, N), from iterate k = 0, 1, ..., its residual g = f(z) - z, and the state."""
        raise NotImplementedError

    def quiet(self, **options: Any) -> Self:
        """The same solver recording nothing, with other options changed: for the solves a caller does not see."""
        return replace(self, trace=False, sample_steps=(), **options)
