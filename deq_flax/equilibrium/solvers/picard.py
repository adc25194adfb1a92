"""Picard iteration, plain or damped."""

from dataclasses import dataclass

import jax

from deq_flax.equilibrium.solution import StopMode, check_solver


@dataclass(frozen=True)
class Picard:
    """z <- z + damping (f(z) - z). Converges linearly, at the spectral radius of (1 - damping) I + damping J.

    Args:
      tol: a member stops when its residual is at most this.
      max_steps: limit on the evaluations of f.
      stop: whether `tol` is about the 'relative' or the 'absolute' residual.
      damping: 1 is the plain iteration; smaller values tame a Jacobian with negative or complex eigenvalues.
      trace: record the residual of every iterate.

    Raises:
      ValueError: an option is out of range.
    """

    tol: float = 1e-6
    max_steps: int = 50
    stop: StopMode = "relative"
    damping: float = 1.0
    trace: bool = False

    def __post_init__(self):
        check_solver(self)
        if not 0 < self.damping <= 1:
            raise ValueError(f"Picard: damping must be in (0, 1], not {self.damping}")

    def init(self, z: jax.Array) -> tuple[()]:
        return ()

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return z + self.damping * g, ()
