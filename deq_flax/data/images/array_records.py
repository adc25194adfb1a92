"""Labeled images in ArrayRecord files, as TensorFlow Datasets writes them: records are tf.train.Example messages.

The few fields needed are read from the protocol buffers directly, without TensorFlow.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from deq_flax.data.loading import readable
from deq_flax.errors import UserError
from deq_flax.untrusted.files import check_regular, read_bytes, shown

_SHARD = re.compile(r".*-(train|validation|valid|val|test)\.array_record(?:-\d+-of-\d+)?")

MAX_LABELS_BYTES = 1 << 24

Value = bytes | int


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """Find the files `*-SPLIT.array_record[-00000-of-00010]` of a folder, in order, by the split in their names."""
    shards: dict[str, list[Path]] = {}
    with readable(folder):
        names = sorted(os.listdir(folder))
    for name in names:
        match = _SHARD.fullmatch(name)
        if match:
            shards.setdefault(match[1], []).append(folder / name)
    return shards


def read_classes(folder: Path) -> tuple[str, ...]:
    """Read the class names, one a line, from `label.labels.txt`. UserError: there is no such file, or it holds no names."""
    path = folder / "label.labels.txt"
    with readable(path):
        text = read_bytes(path, MAX_LABELS_BYTES).decode("utf-8")
    names = tuple(text.removesuffix("\n").split("\n"))
    if not all(names):
        raise UserError(f"{path} must hold the name of a class on each line: get it again")
    return names


class ArrayRecords:
    """The records of several shards in order; the name of a record is its number in decimal.

    Args:
        shards: the files, at least one.
        classes: the names of the labels 0, 1, ...

    Raises:
        UserError: the package array_record is not installed, or a shard cannot be read.
    """

    def __init__(self, shards: list[Path], classes: tuple[str, ...]):
        self.classes = classes
        try:
            from array_record.python.array_record_data_source import ArrayRecordDataSource  # not on every platform
        except ImportError as error:
            raise UserError("ArrayRecord files need the package array_record: pip install array-record") from error
        for path in shards:
            with readable(path):
                check_regular(path)
        try:
            self._source = ArrayRecordDataSource([str(path) for path in shards])
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            raise UserError(f"cannot read {shards[0].parent}: {shown(' '.join(str(error).split()))}") from error
        self._folder = shards[0].parent

    def __len__(self) -> int:
        return len(self._source)

    def read(self, name: str) -> tuple[bytes, int]:
        """Read the encoded image and the label of record `name`. ValueError: one is missing, or the label is out of range."""
        features = _features(self._source[int(name)])
        image, label = features.get("image"), features.get("label")
        if not isinstance(image, bytes) or not isinstance(label, int):
            raise ValueError("it has no features 'image' and 'label'")
        if label >= len(self.classes):
            raise ValueError(f"its label is {label} of {len(self.classes)} classes")
        return image, label

    def label(self, name: str) -> str:
        """The full name of a record, for messages."""
        return f"{self._folder}: record {name}"


def _features(record: bytes) -> Mapping[str, Value]:
    """Read the first value of every bytes or integer feature of a tf.train.Example. ValueError: it is not one."""
    found: dict[str, Value] = {}
    for number, features in _fields(record):
        for _, entry in _fields(features) if number == 1 and isinstance(features, bytes) else ():
            parts = dict(_fields(_bytes(entry)))  # a map entry: field 1 is the name, field 2 the feature
            for kind, values in _fields(_bytes(parts.get(2, b""))):
                value = next((value for _, value in _fields(_bytes(values))), None)
                if kind == 3 and isinstance(value, bytes):  # packed integers
                    value = _varint(value, 0)[0]
                if kind in (1, 3) and value is not None:
                    found[_bytes(parts.get(1, 0)).decode()] = value
    return found


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Yield (number, value) of each field of a protocol buffer message. ValueError: it is cut off or of another format."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif wire in (1, 5):
            value, at = 0, at + (8 if wire == 1 else 4)  # a float, not needed
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(message):
            raise ValueError("the record is cut off")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("the record is cut off")
        value |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if message[at - 1] < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("it is no tf.train.Example")
    return value
