"""MNIST and data sets of the same format: four idx files, gzipped or not."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from deq_flax.data.images.labeled import LabeledArrays
from deq_flax.data.loading import data_path
from deq_flax.errors import UserError
from deq_flax.untrusted.files import check_regular

MAX_RATIO, MAX_FLOOR = 16, 1 << 26
"""A gzipped array may have MAX_FLOOR + MAX_RATIO times the size of its file, in bytes; MNIST's have six times."""

_PARTS = {"train": "train", "test": "t10k"}


def load_idx(path: str, published: str) -> dict[str, LabeledArrays]:
    """Read images (N, H, W, 1) uint8 and labels (N,) uint8 of 'train' and 'test'.

    Args:
        path: the folder of {train,t10k}-{images-idx3,labels-idx1}-ubyte, gzipped or not.
        published: publisher of the files, for messages.

    Raises:
        UserError: a file is missing or damaged, or the numbers of images and labels differ.
    """
    wanted = f"set data.path to the folder of {{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte[.gz]; published as {published}"
    folder = data_path(path, wanted)
    splits = {}
    for split, part in _PARTS.items():
        images = read_idx(_find(folder, f"{part}-images-idx3-ubyte", wanted), rank=3)
        labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte", wanted), rank=1)
        if len(images) != len(labels):
            raise UserError(f"{folder} has {len(images)} images but {len(labels)} labels in its {part} files: get them again")
        splits[split] = images[..., None], labels
    return splits


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Read an idx file of unsigned bytes as an array of `rank` dimensions. UserError: it cannot be read or is no such file."""
    header, packed = 4 + 4 * rank, path.suffix == ".gz"
    try:
        size = check_regular(path)
        with gzip.open(path) if packed else path.open("rb") as file:
            start = file.read(header)
            if start[:4] != bytes((0, 0, 8, rank)) or len(start) < header:
                raise UserError(f"{path} is no idx file of {rank} dimension(s) of bytes: get it again")
            shape = struct.unpack(f">{rank}I", start[4:])
            n_bytes = math.prod(shape)
            if n_bytes > (MAX_FLOOR + MAX_RATIO * size if packed else size):
                raise UserError(f"{path} is damaged: it states an array of {shape} in a file of {size} bytes; get it again")
            content = file.read(n_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) != n_bytes:
        held = f"more than {n_bytes}" if len(content) > n_bytes else len(content)
        raise UserError(f"{path} is damaged: it holds {held} bytes for an array of {shape}; get it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _find(folder: Path, name: str, wanted: str) -> Path:
    # The published names have a '-' before 'idx'; some copies a '.'.
    for candidate in (name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(f"{folder} has no {name}[.gz]: {wanted}")
