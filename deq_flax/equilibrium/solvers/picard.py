"""Picard iteration, plain or relaxed."""

from dataclasses import dataclass

import jax

from deq_flax.equilibrium.loop import Solver


@dataclass(frozen=True)
class Picard(Solver):
    """z <- z + relaxation (f(z) - z). Converges linearly, at the spectral radius of (1 - relaxation) I + relaxation J.

    On the linear adjoint equation this is the Neumann series, summed until it converges.

    Raises:
      ValueError: an option is out of range.
    """

    relaxation: float = 1.0
    """Weight of f(z) in a step, in (0, 1]; 1 is plain iteration, less helps with negative or complex eigenvalues."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.relaxation <= 1:
            raise ValueError(f"Picard: relaxation must be in (0, 1], not {self.relaxation}")

    def init(self, z: jax.Array) -> tuple[()]:
        return ()

    def step(self, k: jax.Array, z: jax.Array, g: jax.Array, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return z + self.relaxation * g, ()
