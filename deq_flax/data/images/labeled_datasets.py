"""Labelled images by name: each data set becomes three splits of examples and the names of its classes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deq_flax.data.images.array_records import ArrayRecords, find_shards, read_classes
from deq_flax.data.images.cifar import CLASSES as CIFAR_CLASSES
from deq_flax.data.images.cifar import load_cifar10
from deq_flax.data.images.files import Damaged, FileTree, is_image
from deq_flax.data.images.idx import load_idx
from deq_flax.data.images.labeled import AUGMENTS, ArrayExamples, Augment, EncodedExamples
from deq_flax.data.splits import ON_DISK, SPLITS, Splits
from deq_flax.errors import UserError

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple("0123456789")
_FOLDERS_WANTED = (
    "set data.path to a folder or zip file of {train,val[,test]}/CLASS/*.JPEG, or to the folder of *-{train,validation}"
    ".array_record-*; ImageNet is published at image-net.org (ILSVRC 2012) for those who sign up"
)

Labelled = ArrayExamples | EncodedExamples
Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are read: what the section `data` of a config says of it."""

    image_size: int
    """Of images in files: they are cropped to this many pixels square. Those in memory stay as they are: 0."""
    resize: int
    """Of images in files: what the shorter side is resized to in evaluation, before its central crop. 0 for those in memory."""
    augment: Augment
    pad: int
    valid_examples: int
    """Training images that are held out to validate on; 0: 'valid' is the data's own, or its test split."""
    max_damaged: int

    def __post_init__(self):
        if self.augment not in AUGMENTS:
            raise UserError(f"unknown data.augment {self.augment!r}; known: {', '.join(AUGMENTS)}")
        for name in ("pad", "valid_examples", "max_damaged"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} must not be negative, but is {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ImageData(Splits[Labelled]):
    """Where a data set has no validation or no test split of its own, one of the two stands for both."""

    class_names: tuple[str, ...]
    damaged: Damaged


def load_images(name: str, path: str, options: ImageOptions) -> ImageData:
    """The data set `name`.

    Args:
        name: 'mnist' and 'fashion_mnist' read the four idx files in `path`; 'cifar10' the python or binary batches there, or
            image files; 'folders' an ImageNet-like tree of images, or ArrayRecord files; 'digits' needs no file: 1797 images of
            8 x 8 that scikit-learn carries.
        path: where the files are.
        options: see `ImageOptions`.

    Raises:
        UserError: an unknown name, files that are missing or damaged, or an option that does not suit them.
    """
    if name not in _LOADERS:
        raise UserError(f"no images {name!r}; known: {', '.join(_LOADERS)}")
    return _LOADERS[name](path, options)


def _mnist(path: str, options: ImageOptions) -> ImageData:
    published = "train-images-idx3-ubyte.gz and so on, 'The MNIST database of handwritten digits' (LeCun, Cortes, Burges)"
    return _in_memory(load_idx(path, published), DIGITS, options, Damaged(options.max_damaged))


def _fashion_mnist(path: str, options: ImageOptions) -> ImageData:
    published = "train-images-idx3-ubyte.gz and so on, Zalando Research's 'fashion-mnist'"
    return _in_memory(load_idx(path, published), FASHION, options, Damaged(options.max_damaged))


def _cifar10(path: str, options: ImageOptions) -> ImageData:
    damaged = Damaged(options.max_damaged)
    return _in_memory(load_cifar10(path, damaged), CIFAR_CLASSES, options, damaged)


def _digits(path: str, options: ImageOptions) -> ImageData:
    try:
        from sklearn.datasets import load_digits  # takes a second to import: only for those who want it
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    # The last fifth, as in scikit-learn's own example: other writers than the first.
    cut = len(images) * 4 // 5
    splits = {"train": (images[:cut], bunch.target[:cut]), "test": (images[cut:], bunch.target[cut:])}
    return _in_memory(splits, DIGITS, options, Damaged(options.max_damaged))


def _in_memory(splits: dict[str, Arrays], names: tuple[str, ...], options: ImageOptions, damaged: Damaged) -> ImageData:
    if options.image_size or options.resize:
        raise UserError("data.image_size and data.resize are for images in files: set them to 0, this data has one size")
    (images, labels), test = splits["train"], ArrayExamples(images_NHWC=splits["test"][0], labels_N=splits["test"][1])
    kept, held_out = hold_out(len(labels), options.valid_examples)
    train = ArrayExamples(images_NHWC=images[kept], labels_N=labels[kept], augment=options.augment, pad=options.pad)
    valid = ArrayExamples(images_NHWC=images[held_out], labels_N=labels[held_out]) if len(held_out) else test
    return ImageData(train=train, valid=valid, test=test, class_names=names, damaged=damaged)


def hold_out(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices that stay and indices that are held out, in order; always the same. UserError: none would stay."""
    if held_out >= count:
        raise UserError(f"data.valid_examples {held_out} leaves nothing of {count} training images: lower it")
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _folders(path: str, options: ImageOptions) -> ImageData:
    if not path:
        raise UserError(f"data.path is not set: {_FOLDERS_WANTED}")
    place = Path(os.path.expanduser(path))
    if not place.exists():
        raise UserError(f"data.path {place} does not exist: {_FOLDERS_WANTED}")
    damaged = Damaged(options.max_damaged)
    shards = find_shards(place) if place.is_dir() else {}
    splits, names = _from_records(place, shards, options, damaged) if shards else _from_tree(FileTree(place), options, damaged)
    if "train" not in splits or not splits.keys() & {"valid", "test"}:
        raise UserError(f"{place} has no training images, or none to evaluate on: {_FOLDERS_WANTED}")
    if options.valid_examples:
        raise UserError("data.valid_examples is for data without a validation split: set it to 0")
    valid, test = splits.get("valid", splits.get("test")), splits.get("test", splits.get("valid"))
    return ImageData(train=splits["train"], valid=valid, test=test, class_names=names, damaged=damaged)  # ty: ignore


def _from_tree(tree: FileTree, options: ImageOptions, damaged: Damaged) -> tuple[dict[str, EncodedExamples], tuple[str, ...]]:
    """Images below .../SPLIT/CLASS/, at any depth; classes in the order of their names, as is usual."""
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
        kinds = {name: number[kind] for name, kind in named} if classes else {}

        def read(name: str, kinds: dict[str, int] = kinds) -> tuple[bytes, int]:
            return tree.read(name), kinds[name]

        examples[split] = _encoded(list(kinds), read, tree.label, damaged, options, split)
    return examples, tuple(classes)


def _from_records(
    place: Path, shards: dict[str, list[Path]], options: ImageOptions, damaged: Damaged
) -> tuple[dict[str, EncodedExamples], tuple[str, ...]]:
    classes, examples = read_classes(place), {}
    for split in SPLITS:
        files = [file for name, meant in ON_DISK.items() if meant == split for file in shards.get(name, ())]
        if files:
            records = ArrayRecords(files, classes)
            names = [str(i) for i in range(len(records))]
            examples[split] = _encoded(names, records.read, records.describe, damaged, options, split)
    return examples, classes


def _encoded(
    names: list[str],
    content: Callable[[str], tuple[bytes, int]],
    label: Callable[[str], str],
    damaged: Damaged,
    options: ImageOptions,
    split: str,
) -> EncodedExamples:
    return EncodedExamples(
        names=names,
        content=content,
        label=label,
        damaged=damaged,
        image_size=options.image_size,
        resize=options.resize,
        augment=options.augment if split == "train" else "none",
    )


_LOADERS: dict[str, Callable[[str, ImageOptions], ImageData]] = {
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "folders": _folders,
    "digits": _digits,
}
