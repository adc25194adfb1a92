"""Data sets of zeros, or of random symbols, in the shapes of the real ones: a task without data, to compile its steps."""

from dataclasses import dataclass, replace

import numpy as np

from deq_flax.config import Config
from deq_flax.data.images.files import DamagedFiles
from deq_flax.data.images.labeled_datasets import LABELED, ImageData, ImageOptions
from deq_flax.data.images.scene_datasets import SCENES, SceneData, SceneOptions
from deq_flax.data.loading import SPLITS, Batch
from deq_flax.data.puzzles.puzzles import PUZZLES, PuzzleOptions
from deq_flax.data.text.corpus import TEXTS, Corpus, TextOptions
from deq_flax.errors import UserError

VOCABULARIES = {"wt103": 267_735, "ptb": 10_000}
"""Words of the published texts."""
SIZES = {"cifar10": 32, "mnist": 28, "fashion_mnist": 28}
"""Height and width of images in memory."""
NO_FILES = ("pydoc", "digits")
"""Data sets that are always at hand."""
MANY = 1 << 24
"""Number of examples or tokens: enough for any batch. Zeros take no memory."""


def without_data(config: Config) -> Config:
    """Return the config with data that needs no files and no time, in the same shapes; what is always at hand stays.

    Raises:
      UserError: a language model's vocabulary is not known.
    """
    data, model = config.data, config.model
    if data.name in NO_FILES:
        return config
    if isinstance(data, TextOptions):
        vocab_size = model.vocab_size or VOCABULARIES.get(data.name, 0)
        if not vocab_size:
            raise UserError(f"set model.vocab_size: the vocabulary of data.name {data.name!r} is not known without its files")
        model = replace(model, vocab_size=vocab_size)
        TEXTS["zeros"] = _text
    elif isinstance(data, ImageOptions):
        size = SIZES.get(data.name, data.image_size)
        shape, classes = (size, size, model.in_channels), model.num_classes
        LABELED["zeros"] = lambda options: _images(shape, classes)
    elif isinstance(data, SceneOptions):
        SCENES["zeros"] = _scenes
    elif isinstance(data, PuzzleOptions):
        return replace(config, data=_puzzles(data))
    else:
        return config
    ignored = {"ignored": ()} if isinstance(data, SceneOptions) else {}
    return replace(config, data=replace(data, name="zeros", path="", **ignored), model=model)


@dataclass(frozen=True)
class Zeros:
    """Black images; labels of one class, for the whole image or, with `dense`, for each pixel."""

    train_shape: tuple[int, ...]
    """(H, W, C) in training."""
    eval_shape: tuple[int, ...]
    """(H, W, C) in evaluation."""
    dense: bool = False

    def __len__(self) -> int:
        return MANY

    @property
    def shape(self) -> tuple[int, ...]:
        return self.train_shape

    def read(self, indices: np.ndarray, random: np.random.Generator | None) -> Batch:
        """Return zeros for the images at `indices` (B,); see `Examples.read`."""
        shape = self.eval_shape if random is None else self.train_shape
        labels = np.zeros((len(indices), *shape[:2]), np.uint8) if self.dense else np.zeros(len(indices), np.int32)
        images = np.zeros((len(indices), *shape), np.uint8)
        return {"images": images, "labels": labels, "mask": np.ones(len(indices), np.float32)}


def _puzzles(data: PuzzleOptions) -> PuzzleOptions:
    """Options of puzzles of random symbols, as few as fill a batch: those of a config may take minutes to find."""
    puzzle, axes = PUZZLES[data.name], 1 if data.name in ("prefix_sums", "a5", "s5") else 2

    def generate(options: PuzzleOptions, size: int, count: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        shape = (count, *(size,) * axes)
        inputs, outputs = puzzle.symbols(size)
        return random.integers(0, inputs, shape, np.uint8), random.integers(0, outputs, shape, np.uint8)

    PUZZLES["symbols"] = replace(puzzle, generate=generate)
    return replace(
        data,
        name="symbols",
        path="",
        train_examples=data.batch_size,
        valid_examples=data.eval_batch_size,
        test_examples=data.eval_batch_size,
        path_lengths=(),
        clues=0,
        grades=(),
    )


def _text(options: TextOptions, vocab_size: int) -> Corpus:
    tokens = np.broadcast_to(np.int32(0), (MANY,))
    return Corpus(train=tokens, valid=tokens, test=tokens, vocab_size=vocab_size)


def _images(shape: tuple[int, int, int], classes: int) -> ImageData:
    splits = dict.fromkeys(SPLITS, Zeros(shape, shape))
    return ImageData(**splits, class_names=tuple(map(str, range(classes))), damaged=DamagedFiles(0))  # ty: ignore


def _scenes(options: SceneOptions, num_classes: int) -> SceneData:
    splits = dict.fromkeys(SPLITS, Zeros((*options.crop_size, 3), (*options.eval_size, 3), dense=True))
    return SceneData(**splits, class_names=tuple(map(str, range(num_classes))), damaged=DamagedFiles(0))  # ty: ignore
