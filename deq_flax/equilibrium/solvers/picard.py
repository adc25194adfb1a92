"""Picard iteration, plain or damped."""

from dataclasses import dataclass

import jax

from deq_flax.equilibrium.solution import Solver


@dataclass(frozen=True)
class Picard(Solver):
    """z <- z + damping (f(z) - z). Converges linearly, at the spectral radius of (1 - damping) I + damping J.

    On the linear adjoint equation this is the Neumann series, summed until it converges.

    Args:
      tol, max_steps, stop, trace, sample_steps: see `Solver`.
      damping: 1 is the plain iteration; smaller values tame a Jacobian with negative or complex eigenvalues.

    Raises:
      ValueError: an option is out of range.
    """

    damping: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise ValueError(f"Picard: damping must be in (0, 1], not {self.damping}")

    def init(self, z: jax.Array) -> tuple[()]:
        return ()

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return z + self.damping * g, ()
