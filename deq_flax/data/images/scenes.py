"""Batches of images with a class for each pixel: crops in training, whole images in evaluation.

Axes: B batch, H height, W width, C channels.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from deq_flax.data.images.augment import mirror, random_flips, scaled_crops
from deq_flax.data.images.files import DamagedFiles, FileTree, decode_all, open_image, to_array
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
        opened = decode_all(
            [scene.image for scene in scenes], lambda i, _: self._open(scenes[i]), self.damaged, self.tree.label
        )
        if random is None:
            size, parts = self.eval_size, [self._whole(pair) for pair in opened]
            mirrored_B = np.zeros(len(scenes), bool)
        else:
            size, parts = self.crop_size, self._crops(opened, random)
            mirrored_B = random_flips(len(scenes), random)
        images = np.zeros((len(scenes), *size, 3), np.uint8)
        labels = np.full((len(scenes), *size), IGNORE, np.uint8)
        for i, part in enumerate(parts):
            if part is not None:
                height, width = part[1].shape
                images[i, :height, :width], labels[i, :height, :width] = part
        mask = np.array([pair is not None for pair in opened], np.float32)
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
        """Decode an image and its mask. Raises any of the errors that `decode_all` handles."""
        image = open_image(self.tree.read(scene.image)).convert("RGB")
        labels = read_labels(self.tree.read(scene.labels))
        if image.size != labels.size:
            raise ValueError(f"the image is {image.size}, its labels {scene.labels} are {labels.size}")
        return image, labels

    def _whole(self, pair: tuple[Image.Image, Image.Image] | None) -> tuple[np.ndarray, np.ndarray] | None:
        """Convert an image and its mask at their own size."""
        if pair is None:
            return None
        width, height = pair[0].size
        if height > self.eval_size[0] or width > self.eval_size[1]:
            raise UserError(f"an image of {height} x {width} is larger than data.eval_size {self.eval_size}: raise that")
        return to_array(pair[0]), np.asarray(pair[1])

    def _crops(
        self, opened: list[tuple[Image.Image, Image.Image] | None], random: np.random.Generator
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Scale and crop in one operation, which resizes only the box that is kept."""
        widths_B, heights_B = np.array([(1, 1) if pair is None else pair[0].size for pair in opened]).T
        crops = scaled_crops(widths_B, heights_B, crop=self.crop_size, scales=self.scales, random=random)

        def crop(i: int, _: str) -> tuple[np.ndarray, np.ndarray] | None:
            pair = opened[i]
            if pair is None:
                return None
            box, size = crops.boxes.corners(i), (int(crops.sizes_B2[i, 0]), int(crops.sizes_B2[i, 1]))
            image = pair[0].resize(size, Image.Resampling.BILINEAR, box=box)
            return to_array(image), np.asarray(pair[1].resize(size, Image.Resampling.NEAREST, box=box))

        return decode_all([""] * len(opened), crop, self.damaged)


def read_labels(content: bytes) -> Image.Image:
    """Decode a mask: the values of a gray or palette image, unchanged. ValueError: it has colors or values above 255."""
    image = Image.open(io.BytesIO(content))
    image.load()
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        raise ValueError(f"labels must be gray or palette images of class numbers, not {image.mode}")
    values = np.asarray(image)
    if values.size and not 0 <= values.min() <= values.max() <= 255:
        raise ValueError(f"it holds labels from {values.min()} to {values.max()}: 0 to 255 are possible")
    return Image.fromarray(values.astype(np.uint8))
