"""A Sudoku solver for many boards at once: bit masks of candidates, singles, and branching where singles do not suffice.

M boards, C cells (side * side, row by row), U units (rows, columns, boxes), S side. A candidate mask has bit d - 1 for digit d.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a box by the side of the board."""


Choose = Callable[[np.ndarray], np.ndarray]
"""Function from masks (M,) to one bit of each."""


class Layout(NamedTuple):
    """The units of a board."""

    units_US: np.ndarray
    """Cells of every row, then column, then box."""
    units_of_C3: np.ndarray
    """Row, column and box of every cell, as indices into the units."""
    every: int
    """The mask of all digits."""


@functools.cache
def layout(side: int) -> Layout:
    """The units of a board of one of the sides in `BOXES`."""
    height, width = BOXES[side]
    row_C, column_C = (axis.reshape(-1) for axis in np.indices((side, side)))
    box_C = row_C // height * (side // width) + column_C // width
    units_of_C3 = np.stack([row_C, side + column_C, 2 * side + box_C], axis=1)
    cells = np.arange(side * side)
    units_US = np.stack([cells[np.any(units_of_C3 == u, axis=1)] for u in range(3 * side)])
    return Layout(units_US, units_of_C3, 2**side - 1)


def candidates(boards_MC: np.ndarray, side: int) -> np.ndarray:
    """Masks (M, C) uint16 of boards of digits, 0 where empty: one bit where there is a digit, else all."""
    return np.where(boards_MC == 0, layout(side).every, 1 << np.maximum(boards_MC.astype(np.int32) - 1, 0)).astype(np.uint16)


def digits(masks_MC: np.ndarray) -> np.ndarray:
    """The digits (M, C) uint8 of masks of one bit each."""
    return (np.log2(np.maximum(masks_MC, 1)).astype(np.uint8) + 1) * (masks_MC > 0)


def propagate(masks_MC: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Apply naked and hidden singles while they change anything: the masks, and which boards (M,) contradict themselves."""
    units_US, units_of_C3, every = layout(side)
    masks, wrong = masks_MC.copy(), np.zeros(len(masks_MC), bool)
    active = np.arange(len(masks))
    while len(active):
        before = masks[active]
        single = _is_single(before)
        units_MUS = np.where(single, before, 0)[:, units_US]
        fixed_MU = np.bitwise_or.reduce(units_MUS, axis=2)
        # Distinct digits add up to their union.
        clash = (units_MUS.sum(axis=2, dtype=np.int32) != fixed_MU).any(axis=1)
        taken = np.bitwise_or.reduce(fixed_MU[:, units_of_C3], axis=2)
        after = np.where(single, before, before & ~taken)
        once_MU, more_MU = np.zeros_like(fixed_MU), np.zeros_like(fixed_MU)
        units_MUS = after[:, units_US]
        for i in range(side):
            more_MU |= once_MU & units_MUS[:, :, i]
            once_MU |= units_MUS[:, :, i]
        only_MC3 = (once_MU & ~more_MU)[:, units_of_C3]
        hidden = after & np.bitwise_or.reduce(only_MC3, axis=2)
        after = np.where(hidden > 0, hidden, after)
        # A cell with no candidate, or the only place of two digits, and a digit without a place.
        bad = clash | (after == 0).any(axis=1) | ((hidden > 0) & ~_is_single(hidden)).any(axis=1)
        bad |= (once_MU != every).any(axis=1)
        masks[active], wrong[active] = after, bad
        active = active[(after != before).any(axis=1) & ~bad]
    return masks, wrong


def count_solutions(masks_MC: np.ndarray, side: int, at_most: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The number of solutions of every board (M,), not counted beyond `at_most`, and the guesses (M,) that it took.

    Where singles do not suffice, the search branches at the first cell of fewest candidates: its lowest candidate is right, or
    it is not. All guesses of the search count, so that their number is a property of a board with one solution: its grade.
    """
    solutions, guesses = np.zeros(len(masks_MC), np.int64), np.zeros(len(masks_MC), np.int64)
    masks, owner = masks_MC, np.arange(len(masks_MC))
    while len(masks):
        masks, wrong = propagate(masks, side)
        solved = _is_single(masks).all(axis=1) & ~wrong
        np.add.at(solutions, owner[solved], 1)
        left = ~solved & ~wrong & (solutions[owner] < at_most)
        masks, owner = masks[left], owner[left]
        np.add.at(guesses, owner, 1)
        masks, owner = np.concatenate(branch(masks, lowest_bit)), np.concatenate([owner, owner])
    return np.minimum(solutions, at_most), guesses


def branch(masks_MC: np.ndarray, choose: Choose) -> tuple[np.ndarray, np.ndarray]:
    """Branch at the first cell of fewest candidates: the boards with one of them assumed right, and with it excluded."""
    rows = np.arange(len(masks_MC))
    number = np.where(_is_single(masks_MC), 99, np.bitwise_count(masks_MC))
    cell = np.argmin(number, axis=1)
    bit = choose(masks_MC[rows, cell])
    right, excluded = masks_MC.copy(), masks_MC.copy()
    right[rows, cell] = bit
    excluded[rows, cell] &= ~bit
    return right, excluded


def lowest_bit(mask_M: np.ndarray) -> np.ndarray:
    """The lowest bit of each mask."""
    return mask_M & (~mask_M + 1).astype(mask_M.dtype)


class RandomBit:
    """A `Choose` that draws a random bit of each mask, in place of `lowest_bit`."""

    def __init__(self, random: np.random.Generator, side: int):
        self._random, self._side = random, side

    def __call__(self, mask_M: np.ndarray) -> np.ndarray:
        bits = 1 << np.arange(self._side)
        draw = np.where(mask_M[:, None] & bits, self._random.random((len(mask_M), self._side)), -1.0)
        return bits[np.argmax(draw, axis=1)].astype(mask_M.dtype)


def _is_single(masks: np.ndarray) -> np.ndarray:
    return (masks != 0) & ((masks & (masks - 1)) == 0)
