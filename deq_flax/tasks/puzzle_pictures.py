"""Puzzles and answers as pictures, drawn with NumPy and Pillow alone: (H, W, 3) uint8.

S side of a puzzle.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deq_flax.data.puzzles.mazes import SYMBOLS
from deq_flax.data.puzzles.sudoku_solver import BOXES
from deq_flax.tasks.drawing import GAP, INK, PAPER, RIGHT, WRONG

SIDE = 252
"""Least side of a picture in pixels."""
WIDEST = 4096
"""Columns of the picture of a sequence, at most."""
_MAZE = {"#": (40, 44, 52), " ": (245, 245, 245), "?": (200, 200, 200), "S": (35, 110, 200), "G": (235, 160, 30), "o": RIGHT}


def draw_maze(inputs_SS: np.ndarray, answer_SS: np.ndarray, targets_SS: np.ndarray) -> np.ndarray:
    """The answer in colors; cells that differ from the target are red: full where path is missing, else a frame of it."""
    table = np.array([_MAZE[symbol] for symbol in SYMBOLS], np.uint8)
    size = max(3, -(-SIDE // len(inputs_SS)))
    picture = table[answer_SS].repeat(size, axis=0).repeat(size, axis=1)
    for y, x in np.argwhere(answer_SS != targets_SS):
        cell = picture[y * size : (y + 1) * size, x * size : (x + 1) * size]
        if SYMBOLS[targets_SS[y, x]] == "o":
            cell[:] = WRONG
        else:
            inner = cell[size // 4 : size - size // 4, size // 4 : size - size // 4].copy()
            cell[:] = WRONG
            cell[size // 4 : size - size // 4, size // 4 : size - size // 4] = inner
    return picture


def draw_sudoku(inputs_SS: np.ndarray, answer_SS: np.ndarray, targets_SS: np.ndarray) -> np.ndarray:
    """The board: clues in black, right digits in green, wrong ones in red; a clue that the answer changes is red too."""
    side = len(inputs_SS)
    size = -(-SIDE // side)
    image = Image.new("RGB", (side * size + 1, side * size + 1), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size * 0.6)
    height, width = BOXES[side]
    for i in range(side + 1):
        draw.line((0, i * size, side * size, i * size), fill=INK, width=2 if i % height == 0 else 1)
        draw.line((i * size, 0, i * size, side * size), fill=INK, width=2 if i % width == 0 else 1)
    for y in range(side):
        for x in range(side):
            digit = int(answer_SS[y, x])
            color = WRONG if digit != targets_SS[y, x] else INK if inputs_SS[y, x] else RIGHT
            if digit:
                draw.text(((x + 0.5) * size, (y + 0.5) * size), str(digit), fill=color, font=font, anchor="mm")
    return np.asarray(image)


DRAWINGS = {"maze": draw_maze, "sudoku": draw_sudoku, "sudoku_csv": draw_sudoku}
"""(inputs, answer, targets), each (S, S), -> picture, by the name of the puzzle; sequences have none."""


def draw_course(answers_TL: np.ndarray, targets_L: np.ndarray) -> np.ndarray:
    """The course of a sequence: a row for each iterate from the top, a column for each symbol, red where it is wrong.

    Of more than `WIDEST` symbols several share a column, red where one of them is wrong.
    """
    length = len(targets_L)
    wrong_TL = np.logical_or.reduceat(answers_TL != targets_L[None], np.arange(0, length, -(-length // WIDEST)), axis=1)
    picture = np.where(wrong_TL[..., None], np.array(WRONG, np.uint8), np.array(PAPER, np.uint8))
    across, down = (max(1, 2 * SIDE // count) for count in (wrong_TL.shape[1], wrong_TL.shape[0]))
    return picture.repeat(down, axis=0).repeat(across, axis=1)


def captioned(picture: np.ndarray, lines: list[str]) -> np.ndarray:
    """A picture above lines of text."""
    height, width, _ = picture.shape
    canvas = Image.new("RGB", (width, height + 14 * len(lines) + 4), PAPER)
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for i, line in enumerate(lines):
        draw.text((2, height + 2 + 14 * i), line, fill=INK, font=font)
    return np.asarray(canvas)


def in_a_row(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures of one height beside each other."""
    gap = np.full((pictures[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)
