"""Perfect mazes by randomized depth-first search, many at once, and the path between two cells.

A maze is a square of characters, `SYMBOLS`. Cells lie at odd rows and columns, with a passage or a wall between neighbors; a
square of even side has one more row and column of wall. Any two open characters are joined by exactly one path.

N mazes, S side, C cells, K cells a side.
"""

import numpy as np

from deq_flax.errors import UserError

SYMBOLS = "?# SGo"
"""Nothing, wall, open, start, goal, path: the numbers of the published data (0 never occurs)."""
_WALL, _OPEN, _START, _GOAL, _PATH = range(1, 6)
_STEPS = ((1, 0), (-1, 0), (0, 1), (0, -1))
_STARTS = 50
"""Starts that are tried in a maze before it is given up."""
_PATIENCE = 1000
"""Mazes in a row without a path of the wanted length after which the search is given up."""


def mazes(
    side: int, count: int, random: np.random.Generator, path_lengths: tuple[int, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Mazes (N, S, S) and their solutions, in which the cells between start and goal are path.

    Args:
      side: side S of the mazes, at least 5.
      count: number N of mazes.
      random: generator that draws everything.
      path_lengths: least and largest number of steps from start to goal; each length is as likely. With side 30 and (100, 140)
        it is the distribution of Maze-Unique (Huang et al. 2026, arXiv:2605.21488). (): start and goal are random.

    Raises:
      UserError: mazes of this size hardly ever have paths so long.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    lengths = random.integers(path_lengths[0], path_lengths[1] + 1, count) if path_lengths else None
    missing, failed = count, 0
    while missing:
        solved_N, *arrays = _with_paths(perfect_mazes(side, missing, random), lengths, random)
        found.append((arrays[0][solved_N], arrays[1][solved_N]))
        # A length that was not found is tried again in another maze: dropping it would favor short paths.
        lengths = None if lengths is None else lengths[~solved_N]
        # A few mazes left to find count as many, or the search for them would be long.
        failed = 0 if solved_N.any() else failed + max(missing, _PATIENCE // 20)
        missing -= int(solved_N.sum())
        if failed >= _PATIENCE:
            raise UserError(f"mazes of side {side} hardly ever have paths of {path_lengths} steps: change data.path_lengths")
    return np.concatenate([inputs for inputs, _ in found]), np.concatenate([targets for _, targets in found])


def perfect_mazes(side: int, count: int, random: np.random.Generator) -> np.ndarray:
    """(N, S, S) bool, true where open: depth-first search from a random cell to a random unvisited neighbor, all N in step."""
    across = (side - 1) // 2
    cells, width = across * across, across + 2
    # The cells with a border of visited ones around them, so that no step leaves the maze.
    inner = ((np.arange(across) + 1)[:, None] * width + np.arange(across) + 1).reshape(-1)
    visited = np.ones((count, width * width), bool)
    visited[:, inner] = False
    steps_4 = np.array([dy * width + dx for dy, dx in _STEPS])
    open_NSS = np.zeros((count, side, side), bool)
    stack = np.zeros((count, cells), np.int64)
    depth, rows = np.zeros(count, np.int64), np.arange(count)
    at = inner[random.integers(0, cells, count)]
    visited[rows, at], stack[:, 0] = True, at

    def carve(rows: np.ndarray, at: np.ndarray, dy: np.ndarray | int = 0, dx: np.ndarray | int = 0) -> None:
        open_NSS[rows, 2 * (at // width) - 1 - dy, 2 * (at % width) - 1 - dx] = True

    carve(rows, at)
    dy_4, dx_4 = np.array(_STEPS).T
    for _ in range(2 * cells - 2):
        at = stack[rows, depth]
        around = at[:, None] + steps_4
        draw = np.where(visited[rows[:, None], around], -1.0, random.random((count, 4)))
        chosen = np.argmax(draw, axis=1)
        going = draw[rows, chosen] >= 0
        to, some, way = around[rows, chosen][going], rows[going], chosen[going]
        depth = np.where(going, depth + 1, np.maximum(depth - 1, 0))
        visited[some, to] = True
        stack[some, depth[going]] = to
        carve(some, to)
        carve(some, to, dy_4[way], dx_4[way])
    return open_NSS


def _with_paths(
    open_NSS: np.ndarray, lengths_N: np.ndarray | None, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a path in each maze, of the given length or of any: which mazes got one (N,), inputs and targets (N, S, S)."""
    count, side = open_NSS.shape[:2]
    rows = np.arange(count)
    flat = open_NSS.reshape(count, -1)
    inputs = np.where(flat, _OPEN, _WALL).astype(np.uint8)
    targets, solved = inputs.copy(), np.zeros(count, bool)
    for _ in range(_STARTS):
        left = rows[~solved]
        if not len(left):
            break
        wanted = None if lengths_N is None else lengths_N[left]
        start = _draw(flat[left], random)
        far = distances(open_NSS[left], start, None if wanted is None else int(wanted.max())).reshape(len(left), -1)
        goals = far > 0 if wanted is None else far == wanted[:, None]
        fits = goals.any(axis=1)
        left, start, far = left[fits], start[fits], far[fits]
        goal = _draw(goals[fits], random)
        for array in (inputs, targets):
            array[left, start], array[left, goal] = _START, _GOAL
        solved[left] = True
        at, some = goal, np.arange(len(left))
        while len(some):  # back to the start: the one neighbor that is nearer
            around = np.stack([at + step for step in (1, -1, side, -side)], axis=1)
            at = around[np.arange(len(at)), np.argmax(far[some[:, None], around] == far[some, at][:, None] - 1, axis=1)]
            going = at != start[some]
            at, some = at[going], some[going]
            targets[left[some], at] = _PATH
    return solved, inputs.reshape(count, side, side), targets.reshape(count, side, side)


def distances(open_NSS: np.ndarray, start_N: np.ndarray, at_most: int | None = None) -> np.ndarray:
    """(N, S, S) int: steps from the start, an index into the flat square, to each open cell; -1 where there is none.

    `at_most`: do not look farther.
    """
    count, side = open_NSS.shape[:2]
    far = np.full((count, side * side), -1, np.int32)  # a path may have half a million steps
    rows, front = np.arange(count), np.asarray(start_N)
    unseen = open_NSS.reshape(count, -1).copy()
    steps = 0
    while len(front):
        far[rows, front], unseen[rows, front] = steps, False
        if steps == at_most:
            break
        # In a tree each cell is reached from one side only, so the front has no duplicates; the border is wall.
        around = np.stack([front + step for step in (1, -1, side, -side)], axis=1)
        i, j = np.nonzero(unseen[rows[:, None], around])
        rows, front, steps = rows[i], around[i, j], steps + 1
    return far.reshape(open_NSS.shape)


def _draw(allowed: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The index of a random true entry of each row."""
    counts = np.cumsum(allowed, axis=1, dtype=np.int32)
    which = (random.random(len(allowed)) * counts[:, -1]).astype(np.int32)
    return np.argmax(counts > which[:, None], axis=1)
