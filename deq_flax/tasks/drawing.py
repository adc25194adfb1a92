"""Predictions as pictures, drawn with NumPy and Pillow alone: (H, W, 3) uint8.

B batch, H height, W width, C channels, K classes.
"""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4
TILE = 96
"""Least side in pixels that a small image is enlarged to, so that a caption fits below."""
TEXT = 12
RIGHT, WRONG, INK, PAPER = (40, 140, 60), (205, 45, 40), (30, 30, 30), (255, 255, 255)
OVERLAY = 0.6
"""Share of the class color in an overlay."""


def colors(count: int) -> np.ndarray:
    """(K, 3) uint8: hues around the circle by the golden ratio, so that neighbors differ, in three brightnesses."""
    hues = [(i * 0.61803398875) % 1.0 for i in range(count)]
    levels = ((0.95, 0.75), (0.65, 0.85), (0.9, 0.45))  # (value, saturation)
    rgb = [colorsys.hsv_to_rgb(hue, levels[i % 3][1], levels[i % 3][0]) for i, hue in enumerate(hues)]
    return np.rint(np.array(rgb) * 255).astype(np.uint8)


def labeled_grid(
    images_BHWC: np.ndarray, labels_B: np.ndarray, probabilities_BK: np.ndarray, class_names: Sequence[str]
) -> np.ndarray:
    """Images in a square grid, each above its label and the predicted one."""
    tiles = []
    for image, label, probabilities in zip(_rgb(images_BHWC), labels_B, probabilities_BK, strict=True):
        predicted = int(probabilities.argmax())
        color = RIGHT if predicted == label else WRONG
        lines = [class_names[label], f"{class_names[predicted]} {probabilities[predicted]:.0%}"]
        tiles.append(_captioned(_enlarged(image), lines, (INK, color), color))
    return _grid(tiles, math.ceil(math.sqrt(len(tiles))))


def overlays(
    images_BHWC: np.ndarray, labels_BHW: np.ndarray, predicted_BHW: np.ndarray, class_names: Sequence[str], ignore: int
) -> np.ndarray:
    """A row for each example: image, truth over it, prediction over it; below, the colors of the classes.

    Where the truth is to be ignored, the image shows through in both.
    """
    table = colors(len(class_names))
    rows = []
    for image, truth, predicted in zip(_rgb(images_BHWC), labels_BHW, predicted_BHW, strict=True):
        counts = truth != ignore
        rows += [image, _blend(image, truth, counts, table), _blend(image, predicted, counts, table)]
    grid = _grid(rows, 3)
    return np.concatenate([grid, _legend(class_names, table, grid.shape[1])])


def _blend(image: np.ndarray, classes: np.ndarray, counts: np.ndarray, table: np.ndarray) -> np.ndarray:
    color = table[np.where(counts, classes, 0)]
    blended = np.rint((1 - OVERLAY) * image + OVERLAY * color).astype(np.uint8)
    return np.where(counts[..., None], blended, image // 2)


def _legend(class_names: Sequence[str], table: np.ndarray, width: int) -> np.ndarray:
    font = ImageFont.load_default(TEXT)
    step = max(math.ceil(font.getlength(name)) for name in class_names) + 3 * TEXT
    columns = max(1, width // step)
    height = math.ceil(len(class_names) / columns) * 2 * TEXT
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(class_names):
        x, y = i % columns * step + GAP, i // columns * 2 * TEXT + TEXT // 2
        draw.rectangle((x, y, x + TEXT, y + TEXT), fill=tuple(int(c) for c in table[i]))
        draw.text((x + 1.5 * TEXT, y - 1), name, fill=INK, font=font)
    return np.asarray(canvas)


def _rgb(images_BHWC: np.ndarray) -> np.ndarray:
    return np.repeat(images_BHWC, 3, axis=3) if images_BHWC.shape[3] == 1 else images_BHWC


def _enlarged(image: np.ndarray) -> np.ndarray:
    times = max(1, math.ceil(TILE / min(image.shape[:2])))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _captioned(image: np.ndarray, lines: Sequence[str], inks: Sequence[tuple[int, int, int]], frame: tuple) -> np.ndarray:
    height, width, _ = image.shape
    canvas = Image.new("RGB", (width, height + len(lines) * (TEXT + 3)), PAPER)
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, width - 1, height - 1), outline=frame, width=2)
    font = ImageFont.load_default(TEXT)
    for i, (line, ink) in enumerate(zip(lines, inks, strict=True)):
        draw.text((1, height + i * (TEXT + 3)), line, fill=ink, font=font)
    return np.asarray(canvas)


def _grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Tiles of one size, with white gaps between them."""
    height, width, _ = tiles[0].shape
    rows = math.ceil(len(tiles) / columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (height + GAP), i % columns * (width + GAP)
        canvas[y : y + height, x : x + width] = tile
    return canvas
