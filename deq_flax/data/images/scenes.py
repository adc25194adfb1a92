"""Batches of images with a class for each pixel: crops in training, whole images in evaluation.

Axes: B batch, H height, W width, C channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from deq_flax.data.images.augment import mirror, random_flips, scaled_crops
from deq_flax.data.images.files import DamagedFiles, FileTree, decode_all, decoding, open_image, to_array
from deq_flax.data.loading import Batch
from deq_flax.errors import UserError

IGNORE = 255
"""Label of pixels that are not scored."""


class Scene(NamedTuple):
    """The names of an image file and of its mask file."""

    image: str
    labels: str


@dataclass(frozen=True, kw_only=True)
class SceneExamples:
    """Images with masks. A batch is `images` (B, H, W, 3) uint8, `labels` (B, H, W) uint8 and `mask` (B,) float32.

    Training crops are scaled and mirrored at random. Where an image does not fill its crop, the crop is black and its labels
    are `IGNORE`. In evaluation, images keep their size and are filled up likewise to `eval_size`. A damaged image is black,
    its labels `IGNORE` and its `mask` 0.
    """

    scenes: Sequence[Scene]
    tree: FileTree
    class_of: np.ndarray
    """(256,) int: the class of each value in the mask files, `IGNORE`, or -1 for values that must not occur."""
    damaged: DamagedFiles
    crop_size: tuple[int, int]
    """Height and width of training crops."""
    eval_size: tuple[int, int]
    """Height and width of evaluation images."""
    scales: tuple[float, ...]
    """Factors by one of which a training image is scaled."""

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) in evaluation."""
        return *self.eval_size, 3

    def read(self, indices: np.ndarray, random: np.random.Generator | None) -> Batch:
        """Decode and crop the scenes at `indices` (B,); see `Examples.read`."""
        scenes = [self.scenes[index] for index in indices]
        names = [scene.image for scene in scenes]
        opened = decode_all(names, lambda i, _: self._open(scenes[i]), self.damaged, self.tree.label)
        if random is None:
            size, decode = self.eval_size, self._whole
            mirrored_B = np.zeros(len(scenes), bool)
        else:
            size, decode = self.crop_size, self._crops(opened, random)
            mirrored_B = random_flips(len(scenes), random)

        def decoded(i: int, _: str) -> tuple[np.ndarray, np.ndarray] | None:
            pair = opened[i]
            return None if pair is None else decode(i, *pair)

        parts = decode_all(names, decoded, self.damaged, self.tree.label)
        images = np.zeros((len(scenes), *size, 3), np.uint8)
        labels = np.full((len(scenes), *size), IGNORE, np.uint8)
        for i, part in enumerate(parts):
            if part is not None:
                height, width = part[1].shape
                images[i, :height, :width], labels[i, :height, :width] = part
        mask = np.array([part is not None for part in parts], np.float32)
        return {
            "images": mirror(images, mirrored_B),
            "labels": mirror(self._as_classes(labels, scenes), mirrored_B),
            "mask": mask,
        }

    def _as_classes(self, labels: np.ndarray, scenes: list[Scene]) -> np.ndarray:
        """Convert mask values (B, H, W) to classes. UserError: a value that is no class."""
        classes = self.class_of[labels]
        if classes.min() < 0:
            count = self.class_of[self.class_of != IGNORE].max() + 1
            index = int((classes < 0).reshape(len(classes), -1).any(axis=1).argmax())
            raise UserError(
                f"{self.tree.label(scenes[index].labels)} holds the label {labels[classes < 0][0]}, which is none of the "
                f"{count} classes: raise model.num_classes, or name it in data.ignored"
            )
        return classes.astype(np.uint8)

    def _open(self, scene: Scene) -> tuple[Image.Image, Image.Image]:
        """Open an image and its mask. Raises any of the errors that `decode_all` handles."""
        image, labels = (open_image(self.tree.read(name)) for name in scene)
        if image.size != labels.size:
            raise ValueError(f"the image is {image.size}, its labels {scene.labels} are {labels.size}")
        return image, labels

    def _whole(self, _: int, image: Image.Image, labels: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """Decode an image and its mask at their own size."""
        width, height = image.size
        if height > self.eval_size[0] or width > self.eval_size[1]:
            raise UserError(f"an image of {height} x {width} is larger than data.eval_size {self.eval_size}: raise that")
        with decoding(image, labels):
            return to_array(image), np.asarray(class_numbers(labels))

    def _crops(
        self, opened: list[tuple[Image.Image, Image.Image] | None], random: np.random.Generator
    ) -> Callable[[int, Image.Image, Image.Image], tuple[np.ndarray, np.ndarray]]:
        """Draw crops; returns the function that scales and crops in one operation, which resizes only the box that is kept."""
        widths_B, heights_B = np.array([(1, 1) if pair is None else pair[0].size for pair in opened]).T
        crops = scaled_crops(widths_B, heights_B, crop=self.crop_size, scales=self.scales, random=random)

        def crop(i: int, image: Image.Image, labels: Image.Image) -> tuple[np.ndarray, np.ndarray]:
            box, size = crops.boxes.corners(i), (int(crops.sizes_B2[i, 0]), int(crops.sizes_B2[i, 1]))
            with decoding(image, labels):
                pixels = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=box)
                numbers = class_numbers(labels).resize(size, Image.Resampling.NEAREST, box=box)
            return to_array(pixels), np.asarray(numbers)

        return crop


def class_numbers(labels: Image.Image) -> Image.Image:
    """Decode a mask: the values of a gray or palette image, unchanged. ValueError: it has colors or values above 255."""
    if labels.mode not in ("L", "P", "1", "I", "I;16"):
        raise ValueError(f"labels must be gray or palette images of class numbers, not {labels.mode}")
    values = np.asarray(labels)
    if values.size and not 0 <= values.min() <= values.max() <= 255:
        raise ValueError(f"it holds labels from {values.min()} to {values.max()}: 0 to 255 are possible")
    return Image.fromarray(values.astype(np.uint8))
