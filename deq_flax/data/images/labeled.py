"""Batches of labeled images: from arrays in memory, or from encoded images decoded when they are read.

Axes: N examples, B batch, H height, W width, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from deq_flax.data.images.augment import Boxes, center_boxes, mirror, pad_crop, random_flips, resized_crop_boxes
from deq_flax.data.images.files import DamagedFiles, decode_all, decoding, open_image, to_array
from deq_flax.data.loading import Batch
from deq_flax.errors import UserError

AUGMENTS = ("none", "crop", "crop_flip", "resized_crop_flip")

LabeledArrays = tuple[np.ndarray, np.ndarray]
"""Images (N, H, W, C) uint8, and labels (N,) of an integer type."""


@dataclass(frozen=True, kw_only=True)
class ArrayExamples:
    """Images of one size in memory. A batch is `images` (B, H, W, C) uint8, `labels` (B,) int32 and `mask` (B,) float32."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray
    augment: str = "none"
    """Augmentation of training images: 'none', 'crop' or 'crop_flip'."""
    pad: int = 0
    """Largest shift of 'crop' and 'crop_flip', in pixels."""

    def __post_init__(self):
        if self.augment == "resized_crop_flip":
            raise UserError("data.augment 'resized_crop_flip' is for images in files; for this data: none, crop or crop_flip")

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.images_NHWC.shape[1:]

    def read(self, indices: np.ndarray, random: np.random.Generator | None) -> Batch:
        """Read the images at `indices` (B,); see `Examples.read`."""
        images = self.images_NHWC[indices]
        if random is not None and self.augment != "none":
            images = pad_crop(images, self.pad, random)
            if self.augment == "crop_flip":
                images = mirror(images, random_flips(len(images), random))
        return {
            "images": images,
            "labels": self.labels_N[indices].astype(np.int32),
            "mask": np.ones(len(indices), np.float32),
        }


@dataclass(frozen=True, kw_only=True)
class EncodedExamples:
    """Encoded images of any size, decoded when they are read. Batches are those of `ArrayExamples` with C = 3.

    A damaged image is black, and its `mask` is 0.
    """

    names: Sequence[str]
    content: Callable[[str], tuple[bytes, int]]
    """Reads the encoded image and the label of a name."""
    label: Callable[[str], str]
    """Converts a name to one for messages."""
    damaged: DamagedFiles
    image_size: int
    """H and W of the batches."""
    resize: int
    """Length that the shorter side is resized to in evaluation, before the central crop."""
    augment: str = "none"
    """Augmentation of training images: 'none' or 'resized_crop_flip'."""

    def __post_init__(self):
        if self.augment not in ("none", "resized_crop_flip"):
            raise UserError(
                f"data.augment {self.augment!r} is for images in memory; for images in files: none, resized_crop_flip"
            )
        if not 1 <= self.image_size <= self.resize:
            raise UserError(f"data.image_size {self.image_size} must be at least 1 and at most data.resize {self.resize}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.image_size, self.image_size, 3

    def read(self, indices: np.ndarray, random: np.random.Generator | None) -> Batch:
        """Decode and crop the images at `indices` (B,); see `Examples.read`."""
        names = [self.names[index] for index in indices]
        opened = decode_all(names, self._open, self.damaged, self.label)
        widths_B, heights_B = np.array([(1, 1) if each is None else each[0].size for each in opened]).T
        if random is not None and self.augment == "resized_crop_flip":
            boxes = resized_crop_boxes(widths_B, heights_B, random)
            mirrored_B = random_flips(len(names), random)
        else:
            boxes = center_boxes(widths_B, heights_B, size=self.image_size, resize=self.resize)
            mirrored_B = np.zeros(len(names), bool)

        def decode(i: int, _: str) -> np.ndarray | None:
            pair = opened[i]
            return None if pair is None else self._crop(pair[0], boxes, i)

        decoded = decode_all(names, decode, self.damaged, self.label)
        images = np.zeros((len(names), *self.shape), np.uint8)
        for i, image in enumerate(decoded):
            if image is not None:
                images[i] = image
        return {
            "images": mirror(images, mirrored_B),
            "labels": np.array([0 if each is None else each[1] for each in opened], np.int32),
            "mask": np.array([image is not None for image in decoded], np.float32),
        }

    def _open(self, _: int, name: str) -> tuple[Image.Image, int]:
        content, label = self.content(name)
        return open_image(content), label

    def _crop(self, image: Image.Image, boxes: Boxes, index: int) -> np.ndarray:
        with decoding(image):
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            size = (self.image_size, self.image_size)
            return to_array(rgb.resize(size, Image.Resampling.BILINEAR, box=boxes.corners(index)))
