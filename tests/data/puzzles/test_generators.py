"""Generated puzzles, each against a solver of another kind: plain Python, cell by cell."""

import itertools
from collections import deque

import numpy as np
import pytest

from deq_flax.data.puzzles.mazes import SYMBOLS, distances, mazes, perfect_mazes
from deq_flax.data.puzzles.sequences import elements, prefix_sums, products, state_tracking
from deq_flax.data.puzzles.sudoku import is_solution, random_symmetry, refined_key, sudokus, symmetric_key
from deq_flax.data.puzzles.sudoku_solver import BOXES


def generator():
    return np.random.default_rng(0)


def test_prefix_sums_are_the_parities_of_prefixes():
    bits, parities = prefix_sums(9, 50, generator())
    for row, targets in zip(bits.tolist(), parities.tolist(), strict=True):
        assert targets == [sum(row[: i + 1]) % 2 for i in range(9)]
    assert 0.4 < bits.mean() < 0.6


@pytest.mark.parametrize(("group", "order"), [("a5", 60), ("s5", 120)])
def test_states_are_products_of_permutations(group, order):
    """Applied one after the other to five things; every element occurs, and the table is closed with an identity first."""
    table = elements(group)
    assert table.shape == (order, 5) and table[0].tolist() == [0, 1, 2, 3, 4]
    inputs, targets = state_tracking(group, 12, 200, generator())
    for row, states in zip(inputs[:20].tolist(), targets[:20].tolist(), strict=True):
        things = list(range(5))
        for element, state in zip(row, states, strict=True):
            things = [int(table[element][thing]) for thing in things]
            assert things == table[state].tolist()
    assert set(inputs.ravel()) == set(targets.ravel()) == set(range(order))
    assert all(sorted(line) == list(range(order)) for line in (*products(group).tolist(), *products(group).T.tolist()))


def breadth_first(open_cells, start):
    """Cell -> (steps from the start, the cell before)."""
    found, queue = {start: (0, None)}, deque([start])
    while queue:
        y, x = queue.popleft()
        for cell in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if cell in open_cells and cell not in found:
                found[cell] = (found[y, x][0] + 1, (y, x))
                queue.append(cell)
    return found


@pytest.mark.parametrize(("side", "lengths"), [(5, ()), (11, ()), (14, (12, 20))])
def test_a_maze_is_a_tree_and_its_solution_the_one_path(side, lengths):
    inputs, targets = mazes(side, 40, generator(), lengths)
    steps = []
    for maze, solution in zip(inputs, targets, strict=True):
        text = {(y, x): SYMBOLS[maze[y, x]] for y in range(side) for x in range(side)}
        open_cells = {cell for cell, symbol in text.items() if symbol != "#"}
        (start,), (goal,) = ([cell for cell, symbol in text.items() if symbol == kind] for kind in "SG")
        found = breadth_first(open_cells, start)
        passages = sum((y + 1, x) in open_cells for y, x in open_cells) + sum((y, x + 1) in open_cells for y, x in open_cells)
        assert found.keys() == open_cells and passages == len(open_cells) - 1, "connected, and without a loop"
        odd = side - 1 + side % 2
        assert {(y, x) for y, x in text if y % 2 == x % 2 == 1 and y < odd and x < odd} <= open_cells, "every cell is used"
        path, at = set(), found[goal][1]
        while at != start:
            path, at = path | {at}, found[at][1]
        expected = {cell: "o" if cell in path else symbol for cell, symbol in text.items()}
        assert {cell: SYMBOLS[solution[cell]] for cell in text} == expected
        steps.append(found[goal][0])
    if lengths:
        assert set(steps) <= set(range(lengths[0], lengths[1] + 1)) and len(set(steps)) > 6


def test_every_published_path_length_is_as_likely():
    """Maze-Unique: side 30, 100 to 140 steps."""
    inputs, targets = mazes(30, 820, generator(), (100, 140))
    steps = (targets == SYMBOLS.index("o")).sum(axis=(1, 2)) + 1
    counts = np.bincount(steps, minlength=141)[100:]
    assert steps.min() == 100 and steps.max() == 140 and len(counts) == 41
    assert ((counts - 20) ** 2 / 20).sum() < 73, "chi squared with 40 degrees of freedom, 0.1%"
    assert (inputs[:, 29] == SYMBOLS.index("#")).all() and (inputs[:, :, 29] == SYMBOLS.index("#")).all()


def test_distances_end_at_the_limit():
    maze = perfect_mazes(11, 1, generator())
    start = np.array([1 * 11 + 1])
    far, near = distances(maze, start)[0], distances(maze, start, at_most=4)[0]
    np.testing.assert_array_equal(near, np.where(far <= 4, far, -1))


def test_distances_of_a_long_way_are_right():
    """A serpentine of side 401 has more steps than 16 bits count."""
    maze = np.zeros((1, 401, 401), bool)
    maze[0, 1::2, 1:-1] = True
    maze[0, 2:-1:4, -2] = maze[0, 4:-1:4, 1] = True
    far = distances(maze, np.array([401 + 1]))[0]
    assert far.max() == maze.sum() - 1 == 79_998 and (far >= 0).sum() == maze.sum()


def peers(side):
    """Cell -> the cells that may not hold the same digit."""
    height, width = BOXES[side]
    cells = list(itertools.product(range(side), repeat=2))
    box = lambda y, x: (y // height, x // width)  # noqa: E731
    return {a: [b for b in cells if b != a and (a[0] == b[0] or a[1] == b[1] or box(*a) == box(*b))] for a in cells}


def solutions(board, side, limit=2):
    """Up to `limit` solutions of a board {cell: digit}, by trying every digit that is free at the most constrained cell."""
    neighbors, board, found = PEERS[side], dict(board), []

    def search():
        choices = {
            a: set(range(1, side + 1)) - {board[b] for b in neighbors[a] if b in board} for a in neighbors if a not in board
        }
        if not choices:
            found.append(dict(board))
            return
        cell = min(choices, key=lambda a: len(choices[a]))
        for digit in choices[cell]:
            board[cell] = digit
            search()
            del board[cell]
            if len(found) >= limit:
                return

    search()
    return found


PEERS = {side: peers(side) for side in BOXES}


def as_board(array):
    return {tuple(cell): int(array[tuple(cell)]) for cell in np.argwhere(array)}


@pytest.fixture(scope="module")
def generated():
    random = generator()
    return {side: sudokus(side, count, random) for side, count in ((4, 40), (6, 40), (9, 12))}


@pytest.mark.parametrize("side", BOXES)
def test_a_sudoku_has_one_solution_and_no_clue_to_spare(generated, side):
    puzzles, answers, _ = generated[side]
    assert is_solution(puzzles, answers).all() and len(np.unique(answers, axis=0)) > 8
    for puzzle, answer in list(zip(puzzles, answers, strict=True))[:8]:
        board = as_board(puzzle)
        assert solutions(board, side) == [as_board(answer)]
        for cell in list(board)[:: 9 if side == 9 else 1]:
            assert len(solutions({a: d for a, d in board.items() if a != cell}, side)) == 2


def solved_by_singles(board, side):
    """Whether naked and hidden singles alone fill a board."""
    height, width = BOXES[side]
    neighbors, board = PEERS[side], dict(board)
    units = [[(i, j) for j in range(side)] for i in range(side)] + [[(j, i) for j in range(side)] for i in range(side)]
    corners = itertools.product(range(0, side, height), range(0, side, width))
    units += [[(y + i, x + j) for i in range(height) for j in range(width)] for y, x in corners]
    progress = True
    while progress and len(board) < side * side:
        free = {
            a: set(range(1, side + 1)) - {board[b] for b in neighbors[a] if b in board} for a in neighbors if a not in board
        }
        sure = {a: digits for a, digits in free.items() if len(digits) == 1}
        for unit, digit in itertools.product(units, range(1, side + 1)):
            places = [a for a in unit if digit in free.get(a, ())]
            if len(places) == 1:
                sure[places[0]] = {digit}
        board |= {a: min(digits) for a, digits in sure.items()}
        progress = bool(sure)
    return len(board) == side * side


def test_the_grade_is_zero_where_singles_suffice(generated):
    for side in BOXES:
        puzzles, _, grades = generated[side]
        for puzzle, grade in zip(puzzles, grades, strict=True):
            assert (grade == 0) == solved_by_singles(as_board(puzzle), side)
    assert 0 < (generated[9][2] > 0).mean() < 1, "both kinds occur"


def test_clues_are_kept_as_asked():
    puzzles, answers, _ = sudokus(9, 4, generator(), clues=40)
    assert ((puzzles > 0).sum(axis=(1, 2)) == 40).all() and is_solution(puzzles, answers).all()


@pytest.mark.parametrize("side", BOXES)
def test_a_symmetry_changes_a_sudoku_but_not_what_it_is(generated, side):
    puzzles, answers, _ = generated[side]
    moved, solved = random_symmetry(puzzles, answers, generator())
    assert is_solution(moved, solved).all() and len(solutions(as_board(moved[0]), side)) == 1
    np.testing.assert_array_equal(symmetric_key(moved), symmetric_key(puzzles))
    np.testing.assert_array_equal(refined_key(moved), refined_key(puzzles))
    if side == 9:
        assert len(np.unique(refined_key(puzzles))) == len(puzzles)
    assert (moved != puzzles).any(axis=(1, 2)).all()
    sums = [np.sort((x > 0).sum(axis=1)) for x in (puzzles, moved)]
    assert (sums[0] != sums[1]).any() == (side != 6), "transposition, where boxes are square"


def test_is_solution_sees_every_kind_of_fault():
    puzzles, answers, _ = sudokus(4, 5, generator())
    wrong = answers.copy()
    wrong[0, 0, 0] = 0  # empty
    wrong[1, 0, 0] = wrong[1, 0, 1]  # twice in a row
    wrong[2, 1] = 5  # no digit of this size
    wrong[3] = wrong[3] % 4 + 1  # valid, but not of this puzzle
    assert is_solution(puzzles, wrong).tolist() == [False, False, False, False, True]
