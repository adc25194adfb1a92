"""Sudoku puzzles from the CSV files of Sudoku-Extreme: `train.csv` and `test.csv` with the columns source,q,a,rating.

q is the board row by row, with '.' where empty; a is its solution.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deq_flax.data.loading import readable
from deq_flax.data.puzzles.sudoku import is_solution
from deq_flax.errors import UserError

HEADER = "source,q,a,rating"
_ROW = re.compile(r"[^,]*,([1-9.]{81}),([1-9]{81}),\d+")
_SHOWN = 5
"""Malformed rows that a message names."""


@dataclass(frozen=True)
class Rows:
    """The different puzzles of a file, in its order."""

    path: Path
    puzzles: list[str]
    answers: list[str]
    lines: np.ndarray
    """(N,): the numbers of their lines."""

    def __len__(self) -> int:
        return len(self.puzzles)

    def boards(self, rows: np.ndarray) -> np.ndarray:
        """The puzzles of some rows, 0 where empty, (N, 9, 9) uint8."""
        return _boards([self.puzzles[row] for row in rows])

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Puzzles and solutions of some rows. UserError: an answer is no solution."""
        puzzle_N99, solution_N99 = self.boards(rows), _boards([self.answers[row] for row in rows])
        wrong = np.sort(self.lines[rows[~is_solution(puzzle_N99, solution_N99)]])
        if len(wrong):
            raise UserError(f"{self.path}: {_named(wrong.tolist())} wrong: the answer is no solution of the puzzle")
        return puzzle_N99, solution_N99


def read_csv(path: Path) -> Rows:
    """The rows of a file; of several with the same puzzle, the first.

    Raises:
      UserError: the file cannot be read, has another header, no rows, or rows that are malformed.
    """
    with readable(path), open(path, encoding="utf-8", errors="replace") as file:
        if file.readline().strip() != HEADER:
            raise UserError(f"{path} does not begin with the line {HEADER}: it is no CSV file of Sudoku-Extreme")
        found: dict[str, tuple[str, int]] = {}
        malformed = []
        for number, line in enumerate(file, 2):
            match = _ROW.fullmatch(line.rstrip("\r\n"))
            if match is None:
                malformed.append(number)
            elif not malformed:
                found.setdefault(match[1], (match[2], number))
    if malformed:
        raise UserError(f"{path}: {_named(malformed)} malformed; a row is SOURCE,81 of 1-9 or '.',81 of 1-9,RATING")
    if not found:
        raise UserError(f"{path} has no puzzles")
    answers, lines = zip(*found.values(), strict=True)
    return Rows(path, list(found), list(answers), np.array(lines))


def _boards(texts: list[str]) -> np.ndarray:
    codes = np.frombuffer("".join(texts).replace(".", "0").encode(), np.uint8)
    return (codes - ord("0")).reshape(-1, 9, 9)


def _named(rows: list[int]) -> str:
    """The subject and verb of a message about rows: 'line 3 is', '7 lines (3, 4, 9, 12, 15, ...) are'."""
    if len(rows) == 1:
        return f"line {rows[0]} is"
    more = ", ..." if len(rows) > _SHOWN else ""
    return f"{len(rows)} lines ({', '.join(map(str, rows[:_SHOWN]))}{more}) are"
