"""What a solve returns, and what a solver is."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Solution:
    """A fixed point, or the best iterate found: `stats.converged` tells which."""

    value: Any
    """A pytree like the initial guess."""
    stats: SolverStats


class Solver(Protocol):
    """How to step towards z = f(z). The loop (`loop.solve`) owns evaluating, counting, stopping and keeping the best.

    A solver is a frozen dataclass of Python numbers: hashable, so that it can be a static argument of `jax.jit`. It works on
    flat states (B, N) and never mixes members of the batch.
    """

    @property
    def tol(self) -> float:
        """A member stops when its residual is at most this."""
        ...

    @property
    def max_steps(self) -> int:
        """Limit on the evaluations of f."""
        ...

    @property
    def stop(self) -> StopMode:
        """Which residual `tol` is about."""
        ...

    @property
    def trace(self) -> bool:
        """Whether to record the residual of every iterate."""
        ...

    def init(self, z: jax.Array) -> Any:
        """The solver's own state for an initial guess z (B, N)."""
        ...

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """The next iterate (B, N), from iterate k = 0, 1, ..., its residual g = f(z) - z, and the state."""
        ...


def check_solver(solver: Solver) -> None:
    """Raise ValueError when an option common to all solvers is out of range."""
    name = type(solver).__name__
    if solver.stop not in ("relative", "absolute"):
        raise ValueError(f"{name}: stop must be 'relative' or 'absolute', not {solver.stop!r}")
    if not solver.tol >= 0:
        raise ValueError(f"{name}: tol must be at least 0, not {solver.tol}")
    if solver.max_steps < 1:
        raise ValueError(f"{name}: max_steps must be at least 1, not {solver.max_steps}")
