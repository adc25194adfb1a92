"""Labeled images by name: three splits of examples and the names of the classes.

To add a data set: a loader function and a line in `LABELED`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deq_flax.data.images.array_records import ArrayRecords, find_shards, read_classes
from deq_flax.data.images.cifar import CLASSES as CIFAR_CLASSES
from deq_flax.data.images.cifar import load_cifar10
from deq_flax.data.images.files import DamagedFiles, FileTree, is_image
from deq_flax.data.images.idx import load_idx
from deq_flax.data.images.labeled import AUGMENTS, ArrayExamples, EncodedExamples, LabeledArrays
from deq_flax.data.loading import ON_DISK, SPLITS, Splits, check_least, data_path
from deq_flax.errors import UserError

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple("0123456789")
_FOLDERS_WANTED = (
    "set data.path to a folder or zip file of {train,val[,test]}/CLASS/*.JPEG, or to the folder of *-{train,validation}"
    ".array_record-*; ImageNet is published at image-net.org (ILSVRC 2012) for those who sign up"
)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Section `data` of an image classifier's config."""

    name: str
    """Data set: {LABELED}. mnist, fashion_mnist and cifar10 are read from the published files; folders are ImageNet-like;
    digits are of scikit-learn."""
    path: str = ""
    """Folder or zip file of the data set; digits needs none."""
    batch_size: int = 32
    """Images in a training step, over all devices and micro-batches."""
    eval_batch_size: int = 100
    """Images in an evaluation step, over all devices."""
    image_size: int = 0
    """Height and width that images read from files are cropped to; 0 for those in memory, which keep their size."""
    resize: int = 0
    """Length of the shorter side before the central crop in evaluation, of images read from files; 0 for those in memory."""
    augment: str = "none"
    """Augmentation in training: none; crop or crop_flip for images in memory; resized_crop_flip for those read from files."""
    pad: int = 0
    """Largest shift, in pixels, of the crop and crop_flip augmentations."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean of each color channel, subtracted from images scaled to 0..1."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Standard deviation of each color channel, which images are divided by."""
    valid_examples: int = 0
    """Training images held out for validation; 0: validate on the data set's own validation split, or on the test images."""
    max_damaged: int = 0
    """Damaged images that are skipped before the run fails."""
    pictures: int = 16
    """Validation images shown with their predictions; 0: none."""

    def __post_init__(self):
        check_least(self, 1, "batch_size", "eval_batch_size")
        check_least(self, 0, "pad", "valid_examples", "max_damaged", "pictures")
        if self.augment not in AUGMENTS:
            raise UserError(f"unknown data.augment {self.augment!r}; known: {', '.join(AUGMENTS)}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class ImageData(Splits[ArrayExamples | EncodedExamples]):
    """Labeled images. A data set without a validation or test split of its own has the other one in its place."""

    class_names: tuple[str, ...]
    damaged: DamagedFiles


def load_images(options: ImageOptions) -> ImageData:
    """Load the data set `options.name`.

    Raises:
        UserError: an unknown name, files that are missing or damaged, or an option that does not suit them.
    """
    if options.name not in LABELED:
        raise UserError(f"no images {options.name!r}; known: {', '.join(LABELED)}")
    return LABELED[options.name](options)


def _load_mnist(options: ImageOptions) -> ImageData:
    published = "train-images-idx3-ubyte.gz and so on, 'The MNIST database of handwritten digits' (LeCun, Cortes, Burges)"
    return _in_memory(load_idx(options.path, published), DIGITS, options)


def _load_fashion_mnist(options: ImageOptions) -> ImageData:
    published = "train-images-idx3-ubyte.gz and so on, Zalando Research's 'fashion-mnist'"
    return _in_memory(load_idx(options.path, published), FASHION, options)


def _load_cifar10(options: ImageOptions) -> ImageData:
    damaged = DamagedFiles(options.max_damaged)
    return _in_memory(load_cifar10(options.path, damaged), CIFAR_CLASSES, options, damaged)


def _load_digits(options: ImageOptions) -> ImageData:
    from sklearn.datasets import load_digits  # imported here because it takes a second

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    # The last fifth, as in scikit-learn's own example: other writers than the first.
    cut = len(images) * 4 // 5
    splits = {"train": (images[:cut], bunch.target[:cut]), "test": (images[cut:], bunch.target[cut:])}
    return _in_memory(splits, DIGITS, options)


def _load_folders(options: ImageOptions) -> ImageData:
    """Load image files by class, or ArrayRecord files."""
    place = data_path(options.path, _FOLDERS_WANTED)
    damaged = DamagedFiles(options.max_damaged)
    shards = find_shards(place) if place.is_dir() else {}
    splits, names = _from_records(place, shards, options, damaged) if shards else _from_tree(FileTree(place), options, damaged)
    if "train" not in splits or not splits.keys() & {"valid", "test"}:
        raise UserError(f"{place} has no training images, or none to evaluate on: {_FOLDERS_WANTED}")
    if options.valid_examples:
        raise UserError("data.valid_examples is for data without a validation split: set it to 0")
    valid, test = splits.get("valid", splits.get("test")), splits.get("test", splits.get("valid"))
    return ImageData(train=splits["train"], valid=valid, test=test, class_names=names, damaged=damaged)  # ty: ignore


LABELED: dict[str, Callable[[ImageOptions], ImageData]] = {
    "mnist": _load_mnist,
    "fashion_mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
    "folders": _load_folders,
    "digits": _load_digits,
}
"""Loaders by `data.name`."""


def _in_memory(
    splits: Mapping[str, LabeledArrays],
    class_names: tuple[str, ...],
    options: ImageOptions,
    damaged: DamagedFiles | None = None,
) -> ImageData:
    """Build the data set from the arrays of 'train' and 'test'."""
    if options.image_size or options.resize:
        raise UserError("data.image_size and data.resize are for images in files: set them to 0, this data has one size")
    (images, labels), test = splits["train"], ArrayExamples(images_NHWC=splits["test"][0], labels_N=splits["test"][1])
    kept, held_out = hold_out(len(labels), options.valid_examples)
    train = ArrayExamples(images_NHWC=images[kept], labels_N=labels[kept], augment=options.augment, pad=options.pad)
    valid = ArrayExamples(images_NHWC=images[held_out], labels_N=labels[held_out]) if len(held_out) else test
    damaged = damaged or DamagedFiles(options.max_damaged)
    return ImageData(train=train, valid=valid, test=test, class_names=class_names, damaged=damaged)


def hold_out(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices that remain and indices that are held out, both sorted, always the same. UserError: none would remain."""
    if held_out >= count:
        raise UserError(f"data.valid_examples {held_out} leaves nothing of {count} training images: lower it")
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _from_tree(
    tree: FileTree, options: ImageOptions, damaged: DamagedFiles
) -> tuple[dict[str, EncodedExamples], tuple[str, ...]]:
    """Find images below .../SPLIT/CLASS/, at any depth; the classes are numbered in alphabetical order, as is usual."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in filter(is_image, tree.names()):
        parts = name.split("/")
        at = next((i for i, part in enumerate(parts[:-2]) if part in ON_DISK), None)
        if at is not None:
            found.setdefault(ON_DISK[parts[at]], []).append((name, parts[at + 1]))
    classes = sorted({kind for _, kind in found.get("train", ())})
    unknown = sorted({kind for named in found.values() for _, kind in named} - set(classes))
    if classes and unknown:
        raise UserError(f"{tree.path} evaluates on classes that it does not train on: {', '.join(unknown[:5])}")
    number = {kind: i for i, kind in enumerate(classes)}
    examples = {}
    for split, named in found.items():
        labels = {name: number[kind] for name, kind in named} if classes else {}

        def read(name: str, labels: dict[str, int] = labels) -> tuple[bytes, int]:
            return tree.read(name), labels[name]

        examples[split] = _encoded(list(labels), read, tree.label, damaged, options, split)
    return examples, tuple(classes)


def _from_records(
    place: Path, shards: Mapping[str, list[Path]], options: ImageOptions, damaged: DamagedFiles
) -> tuple[dict[str, EncodedExamples], tuple[str, ...]]:
    """Find the records of each split in ArrayRecord files."""
    classes, examples = read_classes(place), {}
    for split in SPLITS:
        files = [file for name, meant in ON_DISK.items() if meant == split for file in shards.get(name, ())]
        if files:
            records = ArrayRecords(files, classes)
            names = [str(i) for i in range(len(records))]
            examples[split] = _encoded(names, records.read, records.label, damaged, options, split)
    return examples, classes


def _encoded(
    names: list[str],
    content: Callable[[str], tuple[bytes, int]],
    label: Callable[[str], str],
    damaged: DamagedFiles,
    options: ImageOptions,
    split: str,
) -> EncodedExamples:
    """Apply the options to the images of one split; only training images are augmented."""
    return EncodedExamples(
        names=names,
        content=content,
        label=label,
        damaged=damaged,
        image_size=options.image_size,
        resize=options.resize,
        augment=options.augment if split == "train" else "none",
    )
