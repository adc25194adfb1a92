"""Hashes of puzzles, the same on every machine: what a puzzle's split is decided by."""

import numpy as np


def fingerprints(key_NK: np.ndarray) -> np.ndarray:
    """(N,) uint64: a hash of each row of small integers."""
    weights = np.random.default_rng(0x5EED).integers(0, 2**63, key_NK.shape[1], dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        return mixed((key_NK.astype(np.uint64) + np.uint64(1)) @ weights)


def mixed(h: np.ndarray) -> np.ndarray:
    """A hash of each uint64, the one of splitmix64."""
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return h
