"""CIFAR-10 in its published forms: pickled batches, binary batches, and image files by class.

Axes: N examples, H height, W width, C channels.
"""

import codecs
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from deq_flax.data.images.files import DamagedFiles, FileTree, decode_all, is_image, open_image, to_array
from deq_flax.data.images.labeled import LabeledArrays
from deq_flax.data.loading import data_path, readable
from deq_flax.errors import UserError
from deq_flax.untrusted.files import read_bytes, shown
from deq_flax.untrusted.pickles import unpickle

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
MAX_BYTES = 1 << 28
"""Largest size of a batch file; the published ones have 31 MB."""
_CHUNK = 1000
"""Image files that are decoded between updates of the progress bar."""
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_WANTED = (
    "set data.path to the folder of data_batch_{1..5} and test_batch (the python or the binary version), or to a folder or zip "
    "file of {train,test}/CLASS/*.png; published as cifar-10-{python,binary}.tar.gz by Krizhevsky, 'The CIFAR-10 dataset'"
)


def load_cifar10(path: str, damaged: DamagedFiles) -> dict[str, LabeledArrays]:
    """Load images (N, 32, 32, 3) uint8 and labels (N,) int32 of 'train' and 'test'.

    Args:
        path: the folder of the batches, or its parent if it is named `cifar-10-batches-py` or `cifar-10-batches-bin`; or a
            folder or zip file of images.
        damaged: records images that cannot be read, which are omitted.

    Raises:
        UserError: there is no such data at `path`, or a batch file is damaged.
    """
    place = data_path(path, _WANTED)
    for folder in (place, place / "cifar-10-batches-py", place / "cifar-10-batches-bin"):
        for suffix, read in (("", read_pickled), (".bin", read_binary)):
            if (folder / f"test_batch{suffix}").is_file():
                return {
                    split: _concatenated([folder / f"{name}{suffix}" for name in names], read)
                    for split, names in _BATCHES.items()
                }
    return _from_images(FileTree(place), damaged)


def read_binary(path: Path) -> LabeledArrays:
    """Read a batch of records of one label byte and 3072 image bytes. UserError: it has another size or bad labels."""
    with readable(path):
        content = read_bytes(path, MAX_BYTES)
    record = 1 + 3 * SIDE * SIDE
    if not content or len(content) % record:
        raise UserError(f"{path} is damaged: its {len(content)} bytes are no multiple of {record}; get it again")
    table = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _images(table[:, 1:]), _checked(table[:, 0].astype(np.int32), path)


def read_pickled(path: Path) -> LabeledArrays:
    """Read a batch of the python version, without executing anything in the file. UserError: it is no such batch."""
    with readable(path):
        content = read_bytes(path, MAX_BYTES)
    try:
        batch = unpickle(io.BytesIO(content), _TABLE)
        pixels = batch[b"data"].array()
        labels = np.asarray(batch[b"labels"], np.int32)
        if pixels.shape != (len(labels), 3 * SIDE * SIDE):
            raise ValueError(f"its images are {pixels.shape}, its labels {len(labels)}")
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is no batch of CIFAR-10 ({shown(' '.join(str(error).split()))}): get it again") from error
    return _images(pixels), _checked(labels, path)


class _Array:
    """Placeholder for a pickled NumPy array: keeps its bytes and shape until `array` builds it."""

    def __init__(self, *_: Any):
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, content = self._state
        if getattr(dtype, "name", None) not in (b"u1", "u1") or fortran:
            raise ValueError("its images are not bytes in rows")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _DType:
    """Placeholder for a pickled NumPy dtype: keeps its name."""

    def __init__(self, name: Any = None, *_: Any):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Ignore the state, such as a byte order, which arrays of bytes do not have."""


def _encode(text: str, encoding: str) -> bytes:
    """Reproduce `codecs.encode` for bytes that Python 3 pickled for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"unexpected encoding {shown(encoding)!r}")
    return codecs.encode(text, "latin1")


_TABLE = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
}
"""Names that a batch may use, with their stand-ins."""


def _images(rows: np.ndarray) -> np.ndarray:
    """Rearrange (N, 3072), one color plane after the other, as (N, 32, 32, 3)."""
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _checked(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.size and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise UserError(f"{path} holds labels from {labels.min()} to {labels.max()}, not 0 to 9: get it again")
    return labels


def _concatenated(paths: list[Path], read: Callable[[Path], LabeledArrays]) -> LabeledArrays:
    missing = ", ".join(path.name for path in paths if not path.is_file())
    if missing:
        raise UserError(f"{paths[0].parent} lacks {missing}: {_WANTED}")
    images, labels = zip(*map(read, paths), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _from_images(tree: FileTree, damaged: DamagedFiles) -> dict[str, LabeledArrays]:
    """Decode all 32 x 32 image files below .../{train,test}/CLASS/."""
    files: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for name in filter(is_image, tree.names()):
        *_, split, kind, _ = ("", "", *name.split("/"))
        if split in files and kind in CLASSES:
            files[split].append((name, CLASSES.index(kind)))
    if not all(files.values()):
        raise UserError(f"{tree.path} holds no CIFAR-10: {_WANTED}")
    return {split: _decoded(tree, named, damaged, split) for split, named in files.items()}


def _decoded(tree: FileTree, named: list[tuple[str, int]], damaged: DamagedFiles, split: str) -> LabeledArrays:
    def decode(_: int, name: str) -> np.ndarray:
        image = open_image(tree.read(name))
        if image.size != (SIDE, SIDE):
            raise ValueError(f"its size is {image.size[0]} x {image.size[1]}, not 32 x 32")
        return to_array(image)

    images, labels = [], []
    with tqdm(
        total=len(named), desc=f"decoding {split}", file=sys.stderr, disable=sys.stderr is None or not sys.stderr.isatty()
    ) as bar:
        for start in range(0, len(named), _CHUNK):
            part = named[start : start + _CHUNK]
            decoded = decode_all([name for name, _ in part], decode, damaged, tree.label)
            kept = [(image, label) for image, (_, label) in zip(decoded, part, strict=True) if image is not None]
            images += [image for image, _ in kept]
            labels += [label for _, label in kept]
            bar.update(len(part))
    if not images:
        raise UserError(f"{tree.path} holds no whole image of split {split}: get it again")
    return np.stack(images), np.array(labels, np.int32)
