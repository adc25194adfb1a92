"""The three splits of a data set, whatever each is made of."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from deq_flax.errors import UserError

SPLITS = ("train", "valid", "test")
ON_DISK = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test"}
"""The split that a name on disk stands for."""

Split = TypeVar("Split")


@dataclass(frozen=True, kw_only=True)
class Splits(Generic[Split]):
    train: Split
    valid: Split
    test: Split

    def split(self, name: str) -> Split:
        """That of 'train', 'valid' or 'test'. Raises UserError for another name."""
        if name not in SPLITS:
            raise UserError(f"no split {name!r}; known: {', '.join(SPLITS)}")
        return getattr(self, name)
