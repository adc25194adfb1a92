"""Augmentation of training images, drawn for a whole batch at once, since a Python loop over examples is slow.

Every function draws from the generator it is given, so that a batch is a function of its seed alone.

Axes: B batch, H height, W width, C channels.
"""

from typing import NamedTuple

import numpy as np

TRIES = 10
"""Boxes drawn for each random resized crop before the central one is taken instead."""


class Boxes(NamedTuple):
    """Boxes in images, in pixels of the original, possibly fractional."""

    left_B: np.ndarray
    upper_B: np.ndarray
    width_B: np.ndarray
    height_B: np.ndarray

    def corners(self, index: int) -> tuple[float, float, float, float]:
        """(left, upper, right, lower) of the box of image `index`."""
        left, upper, width, height = (float(values[index]) for values in self)
        return left, upper, left + width, upper + height


def pad_crop(images_BHWC: np.ndarray, pad: int, random: np.random.Generator) -> np.ndarray:
    """Shift each image by up to `pad` pixels along both axes, filling with zeros: pad and random crop (He et al. 2015)."""
    batch, height, width, _ = images_BHWC.shape
    offsets = random.integers(0, 2 * pad + 1, (2, batch, 1))
    padded = np.pad(images_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows_BH, columns_BW = offsets[0] + np.arange(height), offsets[1] + np.arange(width)
    return padded[np.arange(batch)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]]


def random_flips(batch: int, random: np.random.Generator) -> np.ndarray:
    """Draw which images to mirror, each with probability 1/2: (B,) bool."""
    return random.random(batch) < 0.5


def mirror(images: np.ndarray, which_B: np.ndarray) -> np.ndarray:
    """Mirror the chosen images (B, H, W, ...) left to right."""
    return np.where(which_B.reshape(-1, *[1] * (images.ndim - 1)), images[:, :, ::-1], images)


def resized_crop_boxes(widths_B: np.ndarray, heights_B: np.ndarray, random: np.random.Generator) -> Boxes:
    """Draw a box of 8% to 100% of each image's area with an aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015).

    If none of ten drawn boxes fits, as in a long and thin image, the box is the largest centered one of those ratios.
    """
    shape = (TRIES, len(widths_B))
    area = random.uniform(0.08, 1.0, shape) * widths_B * heights_B
    ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), shape))
    width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (width <= widths_B) & (height <= heights_B)
    first, column = fits.argmax(axis=0), np.arange(len(widths_B))
    width_B, height_B = width[first, column], height[first, column]
    none = ~fits.any(axis=0)
    whole_ratio = np.clip(widths_B / heights_B, 3 / 4, 4 / 3)
    width_B = np.where(none, np.minimum(widths_B, heights_B * whole_ratio), width_B)
    height_B = np.where(none, np.minimum(heights_B, widths_B / whole_ratio), height_B)
    left_B, upper_B = random.random((2, len(widths_B))) * (widths_B - width_B, heights_B - height_B)
    centered = (widths_B - width_B) / 2, (heights_B - height_B) / 2
    return Boxes(np.where(none, centered[0], left_B), np.where(none, centered[1], upper_B), width_B, height_B)


def center_boxes(widths_B: np.ndarray, heights_B: np.ndarray, *, size: int, resize: int) -> Boxes:
    """Boxes equivalent to resizing the shorter side to `resize` and taking the central `size` x `size`."""
    side_B = np.minimum(widths_B, heights_B) * (size / resize)
    return Boxes((widths_B - side_B) / 2, (heights_B - side_B) / 2, side_B, side_B)


class ScaledCrops(NamedTuple):
    """Crops of one size from images of any size: each box is resized and placed in the upper left corner of its crop."""

    boxes: Boxes
    sizes_B2: np.ndarray
    """Width and height that each box is resized to: smaller than the crop where the scaled image does not fill it."""


def scaled_crops(
    widths_B: np.ndarray,
    heights_B: np.ndarray,
    *,
    crop: tuple[int, int],
    scales: tuple[float, ...],
    random: np.random.Generator,
) -> ScaledCrops:
    """Scale each image by one of `scales`, then draw a crop (height, width), which a small image does not fill."""
    scale_B = np.asarray(scales)[random.integers(0, len(scales), len(widths_B))]
    box_width_B = np.minimum(crop[1] / scale_B, widths_B)
    box_height_B = np.minimum(crop[0] / scale_B, heights_B)
    left_B, upper_B = random.random((2, len(widths_B))) * (widths_B - box_width_B, heights_B - box_height_B)
    sizes_B2 = np.rint(np.stack([box_width_B * scale_B, box_height_B * scale_B], axis=1)).astype(int)
    return ScaledCrops(Boxes(left_B, upper_B, box_width_B, box_height_B), np.clip(sizes_B2, 1, (crop[1], crop[0])))
