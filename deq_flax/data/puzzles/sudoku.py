"""Sudoku puzzles with one solution, graded, and the symmetries of the board.

N puzzles, S side, C cells.
"""

import numpy as np

from deq_flax.data.puzzles.fingerprints import mixed
from deq_flax.data.puzzles.sudoku_solver import BOXES, RandomBit, branch, candidates, count_solutions, digits, layout, propagate


def sudokus(side: int, count: int, random: np.random.Generator, clues: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puzzles (N, S, S), 0 where empty, their solutions (N, S, S), and their grades (N,).

    A full board loses clues in random order as long as the solution stays the only one. The grade is the number of guesses of
    `count_solutions`: 0 for a puzzle that singles solve.

    Args:
      side: side S of the boards, one of `BOXES`.
      count: number N of puzzles.
      random: generator that draws everything.
      clues: number of clues to stop at; 0: stop where no clue can be spared.
    """
    solution_NC = full_boards(side, count, random)
    puzzle_NC = solution_NC.copy()
    order_NC = random.permuted(np.tile(np.arange(side * side), (count, 1)), axis=1)
    for cell_N in order_NC.T:
        rows = np.flatnonzero(np.count_nonzero(puzzle_NC, axis=1) > clues)
        if not len(rows):
            break
        cell_N, tried = cell_N[rows], puzzle_NC[rows]
        some = np.arange(len(rows))
        tried[some, cell_N] = 0
        # The solution stays the only one if no other digit fits here.
        masks = candidates(tried, side)
        masks[some, cell_N] &= ~candidates(solution_NC[rows], side)[some, cell_N]
        spared = count_solutions(masks, side, at_most=1)[0] == 0
        puzzle_NC[rows[spared], cell_N[spared]] = 0
    grade_N = count_solutions(candidates(puzzle_NC, side), side)[1]
    return puzzle_NC.reshape(-1, side, side), solution_NC.reshape(-1, side, side), grade_N


def full_boards(side: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Random full boards (N, C), made by random guesses with singles in between; a board that fails starts again."""
    empty = candidates(np.zeros((count, side * side), np.uint8), side)
    masks, choose = empty.copy(), RandomBit(random, side)
    unfinished = np.arange(count)
    while len(unfinished):
        guessed, wrong = propagate(branch(masks[unfinished], choose)[0], side)
        guessed[wrong] = empty[0]
        masks[unfinished] = guessed
        unfinished = unfinished[(np.bitwise_count(guessed) > 1).any(axis=1)]
    return digits(masks)


def is_solution(puzzle_NSS: np.ndarray, solution_NSS: np.ndarray) -> np.ndarray:
    """Return which solutions are full valid boards that keep the clues of their puzzles, (N,) bool."""
    count, side = solution_NSS.shape[:2]
    masks = candidates(solution_NSS.reshape(count, -1), side)
    full = ((solution_NSS > 0) & (solution_NSS <= side)).all(axis=(1, 2))
    return full & ~propagate(masks, side)[1] & ((puzzle_NSS == 0) | (puzzle_NSS == solution_NSS)).all(axis=(1, 2))


def random_symmetry(
    puzzle_NSS: np.ndarray, solution_NSS: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same puzzles under random symmetries, one each: digits, bands, rows in bands, the same of columns, transposition.

    Bands are the rows of boxes, stacks their columns. Boards of oblong boxes are not transposed.
    """
    count, side = puzzle_NSS.shape[:2]
    height, width = BOXES[side]
    renamed = np.concatenate([np.zeros((count, 1), np.uint8), 1 + _permutations(count, side, random)], axis=1).astype(np.uint8)
    rows, columns = _line_order(count, side, height, random), _line_order(count, side, width, random)
    flipped = random.random(count) < 0.5 if height == width else np.zeros(count, bool)
    n = np.arange(count)[:, None, None]

    def apply(boards: np.ndarray) -> np.ndarray:
        moved = renamed[n, boards][n, rows[:, :, None], columns[:, None, :]]
        return np.where(flipped[:, None, None], moved.swapaxes(1, 2), moved)

    return apply(puzzle_NSS), apply(solution_NSS)


def symmetric_key(puzzle_NSS: np.ndarray) -> np.ndarray:
    """Numbers (N, K) that are the same for puzzles that `random_symmetry` turns into each other.

    The numbers are the counts of each digit, and of the clues in the lines of each band and stack, all in sorted order.
    """
    count, side = puzzle_NSS.shape[:2]
    height, width = BOXES[side]
    numbers = np.sort((puzzle_NSS.reshape(count, -1, 1) == 1 + np.arange(side)).sum(axis=1), axis=1)
    given = puzzle_NSS > 0
    rows, columns = _sorted_lines(given.sum(axis=2), height), _sorted_lines(given.sum(axis=1), width)
    if height == width:  # transposition exchanges them
        later = _less(columns, rows)[:, None]
        rows, columns = np.where(later, columns, rows), np.where(later, rows, columns)
    return np.concatenate([numbers, rows, columns], axis=1)


def refined_key(puzzle_NSS: np.ndarray) -> np.ndarray:
    """Numbers (N,) uint64 that are the same for puzzles that `random_symmetry` turns into each other, and hardly for others.

    Hashes of rows, columns, boxes and digits, refined by those that they share a clue, a band or a stack with, as colors are in
    Weisfeiler and Leman's test of isomorphic graphs. (`symmetric_key` is the same for four in a million pairs of 9 x 9.)
    """
    count, side = puzzle_NSS.shape[:2]
    height, width = BOXES[side]
    digit_NC = puzzle_NSS.reshape(count, -1).astype(np.int64)
    units_NC3 = np.broadcast_to(layout(side).units_of_C3, (*digit_NC.shape, 3))
    # Of every cell: row, column, box and digit, four nodes of a graph; an empty one has a digit that is not read.
    node_NC4 = np.concatenate([units_NC3, 3 * side + np.maximum(digit_NC, 1)[:, :, None] - 1], axis=2)
    n, given_NC = np.arange(count)[:, None, None], digit_NC > 0
    hash_NV = np.tile(np.repeat(np.array([1, 1, 2, 3], np.uint64), side), (count, 1))
    for _ in range(2):
        cell_NC = mixed(mixed(hash_NV)[n, node_NC4].sum(axis=2)) * given_NC
        np.add.at(hash_NV, (n, node_NC4), cell_NC[:, :, None])
        hash_NV = mixed(hash_NV)
        for first, thickness in ((0, height), (side, width)):
            lines = hash_NV[:, first : first + side]
            lines += mixed(lines.reshape(count, -1, thickness).sum(axis=2)).repeat(thickness, axis=1)
    return mixed(hash_NV.sum(axis=1))


def _sorted_lines(clues_NS: np.ndarray, thickness: int) -> np.ndarray:
    """(N, S): the clues of lines, sorted in each band, and the bands sorted."""
    bands = np.sort(clues_NS.reshape(len(clues_NS), -1, thickness), axis=2)
    weight = 100 ** np.arange(thickness)[::-1]
    order = np.argsort(bands @ weight, axis=1)
    return np.take_along_axis(bands, order[:, :, None], axis=1).reshape(clues_NS.shape)


def _less(a_NK: np.ndarray, b_NK: np.ndarray) -> np.ndarray:
    """Return where a comes before b in lexicographic order, (N,) bool."""
    first = np.argmax(a_NK != b_NK, axis=1)[:, None]
    return (np.take_along_axis(a_NK, first, axis=1) < np.take_along_axis(b_NK, first, axis=1))[:, 0]


def _permutations(count: int, size: int, random: np.random.Generator) -> np.ndarray:
    return random.permuted(np.tile(np.arange(size), (count, 1)), axis=1)


def _line_order(count: int, side: int, thickness: int, random: np.random.Generator) -> np.ndarray:
    """(N, S): an order of lines that keeps bands together."""
    bands = _permutations(count, side // thickness, random)
    inner = np.stack([_permutations(count, thickness, random) for _ in range(side // thickness)], axis=1)
    return (bands[:, :, None] * thickness + inner).reshape(count, side)
