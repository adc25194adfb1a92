"""Puzzles on sequences: prefix sums, and the state of a permutation group. Solved by a scan; hard for networks of fixed depth.

N puzzles, L length, G elements of a group.
"""

import functools
import itertools

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]
"""Inputs and targets, (N, ...) uint8 each."""


def prefix_sums(length: int, count: int, random: np.random.Generator) -> Arrays:
    """Random bits (N, L) and the parity of every prefix (Schwarzschild et al. 2021, arXiv:2106.04537)."""
    bits_NL = random.integers(0, 2, (count, length), dtype=np.uint8)
    return bits_NL, np.bitwise_xor.accumulate(bits_NL, axis=1)


def state_tracking(group: str, length: int, count: int, random: np.random.Generator) -> Arrays:
    """Random elements (N, L) of a group and the product of every prefix (Merrill et al. 2024, arXiv:2404.08819).

    Element i is the permutation `elements(group)[i]`; in the product of a prefix, earlier permutations act first.
    """
    table_GG = products(group)
    inputs_NL = random.integers(0, len(table_GG), (count, length), dtype=np.uint8)
    targets_NL = np.empty_like(inputs_NL)
    state_N = np.zeros(count, np.uint8)
    for i in range(length):
        state_N = table_GG[state_N, inputs_NL[:, i]]
        targets_NL[:, i] = state_N
    return inputs_NL, targets_NL


@functools.cache
def elements(group: str) -> np.ndarray:
    """The permutations of five things in 's5', (120, 5), or the even ones in 'a5', (60, 5); the identity first."""
    everything = np.array(list(itertools.permutations(range(5))), np.uint8)
    if group == "s5":
        return everything
    inversions = sum((everything[:, i] > everything[:, j]).astype(int) for i in range(5) for j in range(i + 1, 5))
    return everything[inversions % 2 == 0]


@functools.cache
def products(group: str) -> np.ndarray:
    """(G, G) uint8: entry (a, b) is the element that applies a, then b."""
    elements_G5 = elements(group)
    digits = 5 ** np.arange(5)
    number = {int(code): i for i, code in enumerate(elements_G5 @ digits)}
    composed_GG5 = elements_G5[:, elements_G5].swapaxes(0, 1)  # (b applied to what a maps to)
    return np.vectorize(number.__getitem__, otypes=[np.uint8])(composed_GG5 @ digits)
