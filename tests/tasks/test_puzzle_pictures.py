"""Pictures of puzzles: what is right, wrong and given has a color of its own."""

import numpy as np
import pytest

from deq_flax.data.puzzles.mazes import SYMBOLS, mazes
from deq_flax.data.puzzles.sudoku import sudokus
from deq_flax.tasks.drawing import RIGHT, WRONG
from deq_flax.tasks.puzzle_pictures import WIDEST, captioned, draw_course, draw_maze, draw_sudoku, in_a_row


def count(picture, color, tolerance=0):
    return int((np.abs(picture.astype(int) - color) <= tolerance).all(axis=-1).sum())


def test_a_maze_shows_the_path_and_where_it_is_missing():
    inputs, targets = (x[0] for x in mazes(11, 1, np.random.default_rng(0)))
    size = draw_maze(inputs, targets, targets).shape[0] // 11
    path = int((targets == SYMBOLS.index("o")).sum())
    assert path > 0
    assert count(draw_maze(inputs, targets, targets), RIGHT) == path * size**2
    unsolved = draw_maze(inputs, inputs, targets)
    assert count(unsolved, WRONG) == path * size**2 and count(unsolved, RIGHT) == 0
    extra = targets.copy()
    extra[0, 0] = SYMBOLS.index("o")  # path through a wall
    framed = draw_maze(inputs, extra, targets)[:size, :size]
    assert 0 < count(framed, WRONG) < size**2 and count(framed, RIGHT) > 0


@pytest.mark.parametrize("side", [4, 6, 9])
def test_a_board_shows_clues_and_answers_in_their_colors(side):
    puzzle, answer, _ = (x[0] for x in sudokus(side, 1, np.random.default_rng(0)))
    solved, wrong = draw_sudoku(puzzle, answer, answer), draw_sudoku(puzzle, answer % side + 1, answer)
    empty = draw_sudoku(puzzle, puzzle, answer)
    green, red = (lambda picture: count(picture, RIGHT, 40)), (lambda picture: count(picture, WRONG, 40))
    assert green(solved) > 0 == red(solved) and red(wrong) > 0 == green(wrong)
    blank = draw_sudoku(0 * puzzle, 0 * puzzle, answer)
    assert green(empty) == red(empty) == 0 and (empty != blank).any()


def test_a_course_has_a_row_for_each_step():
    answers, targets = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 0]]), np.array([0, 1, 0])
    picture = draw_course(answers, targets)
    rows, columns = picture.shape[0] // 4, picture.shape[1] // 3
    shown = (picture[::rows, ::columns] == np.array(WRONG)).all(axis=-1)
    np.testing.assert_array_equal(shown, answers != targets)


def test_captions_and_rows_keep_the_pictures():
    picture = np.full((20, 30, 3), 7, np.uint8)
    below = captioned(picture, ["step 1", "wrong 3"])
    np.testing.assert_array_equal(below[:20], picture)
    assert (below[20:] != 255).any() and below.shape[1] == 30
    assert in_a_row([picture, picture, picture]).shape[1] > 90


def test_the_course_of_a_long_sequence_hides_no_wrong_symbol():
    answers, targets = np.zeros((2, 10_000), np.uint8), np.zeros(10_000, np.uint8)
    answers[1, 9_999] = 1
    picture = draw_course(answers, targets)
    half = len(picture) // 2
    assert (
        picture.shape[1] <= WIDEST and (picture[half:, -1] == WRONG).all() and not (picture[:half] == WRONG).all(axis=-1).any()
    )
