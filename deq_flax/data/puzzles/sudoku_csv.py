"""Sudoku puzzles from the CSV files of Sudoku-Extreme: `train.csv` and `test.csv` with the columns source,q,a,rating.

q is the board row by row, with '.' where empty; a is its solution.
"""

import re
from pathlib import Path

import numpy as np

from deq_flax.data.loading import readable
from deq_flax.data.puzzles.sudoku import is_solution
from deq_flax.errors import UserError

HEADER = "source,q,a,rating"
_ROW = re.compile(r"[^,]*,([1-9.]{81}),([1-9]{81}),\d+")
_SHOWN = 5
"""Malformed rows that a message names."""


def read_csv(path: Path, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Puzzles, 0 where empty, and solutions, (N, 9, 9) uint8: `count` random rows in the order of the file, or all if 0.

    Raises:
      UserError: the file cannot be read, has another header, fewer rows, or rows that are malformed or wrong.
    """
    with readable(path), open(path, encoding="utf-8", errors="replace") as file:
        if file.readline().strip() != HEADER:
            raise UserError(f"{path} does not begin with the line {HEADER}: it is no CSV file of Sudoku-Extreme")
        matches, malformed = [], []
        for number, line in enumerate(file, 2):
            match = _ROW.fullmatch(line.rstrip("\r\n"))
            if match is None:
                malformed.append(number)
            elif not malformed:
                matches.append(match.groups())
    if malformed:
        raise UserError(f"{path}: {_named(malformed)} malformed; a row is SOURCE,81 of 1-9 or '.',81 of 1-9,RATING")
    if len(matches) < max(count, 1):
        raise UserError(
            f"{path} has {len(matches)} puzzles, but {max(count, 1)} are wanted: lower data.train_examples and so on"
        )
    rows = np.arange(len(matches))
    if count:
        rows = np.sort(np.random.default_rng(seed).permutation(len(matches))[:count])
    puzzle_N99, solution_N99 = (_boards([matches[row][side] for row in rows]) for side in (0, 1))
    wrong = rows[~is_solution(puzzle_N99, solution_N99)] + 2
    if len(wrong):
        raise UserError(f"{path}: {_named(wrong.tolist())} wrong: the answer is no solution of the puzzle")
    return puzzle_N99, solution_N99


def _boards(texts: list[str]) -> np.ndarray:
    codes = np.frombuffer("".join(texts).replace(".", "0").encode(), np.uint8)
    return (codes - ord("0")).reshape(-1, 9, 9)


def _named(rows: list[int]) -> str:
    """The subject and verb of a message about rows: 'line 3 is', '7 lines (3, 4, 9, 12, 15, ...) are'."""
    if len(rows) == 1:
        return f"line {rows[0]} is"
    more = ", ..." if len(rows) > _SHOWN else ""
    return f"{len(rows)} lines ({', '.join(map(str, rows[:_SHOWN]))}{more}) are"
