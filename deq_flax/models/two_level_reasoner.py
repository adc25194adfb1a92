"""A model of puzzles with a state of two levels.

After HRM (Wang et al. 2025, arXiv:2506.21734), TRM (Jolicoeur-Martineau 2025, arXiv:2510.04871) and EqR (Huang et al. 2026,
arXiv:2605.21488).

B batch, S the axes of a puzzle's cells, D features.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from deq_flax.models.attention_reasoner import AttentionReasoner, AttentionReasonerOptions


@dataclass(frozen=True, kw_only=True)
class TwoLevelReasonerOptions(AttentionReasonerOptions):
    """Options of a `TwoLevelReasoner`.

    Raises:
      ValueError: a value is out of range.
    """

    name: str = "two_level_reasoner"
    low_steps: int = 6
    """Updates of the lower level in an application of f, before the one of the higher level."""
    relaxation: float = 1.0
    """Weight of the new value in each update of a level, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_steps < 1 or not 0 < self.relaxation <= 1:
            raise ValueError(
                f"low_steps must be at least 1 and relaxation in (0, 1], got {self.low_steps} and {self.relaxation}"
            )


class Levels(NamedTuple):
    """A state of two levels, each (B, S, D)."""

    high: jax.Array
    """The answer is read from it."""
    low: jax.Array


class TwoLevelReasoner(AttentionReasoner):
    """One network updates both levels: low <- net(low + high + x) several times, then high <- net(high + low).

    An application of f is one such cycle; TRM takes three in a segment and differentiates the last, `Unroll(3, last=1)`.

    Raises:
      ValueError: an option is out of range.
    """

    Options = TwoLevelReasonerOptions

    def draw(self, shape: tuple[int, ...], key: jax.Array) -> Levels:
        high_key, low_key = jax.random.split(key)
        return Levels(super().draw(shape, high_key), super().draw(shape, low_key))

    def read(self, z: Levels) -> jax.Array:
        return z.high

    def evaluate(self, z: Levels, x_BSD: jax.Array) -> Levels:
        share, (high, low) = self.options.relaxation, z
        for _ in range(self.options.low_steps):
            low = (1 - share) * low + share * self.transform(low + high + x_BSD)
        return Levels((1 - share) * high + share * self.transform(high + low), low)
