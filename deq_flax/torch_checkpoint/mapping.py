"""From the originals' names and layouts to our modules and back, by a table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx

from deq_flax.errors import UserError
from deq_flax.torch_checkpoint.reader import TensorFile


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    A name such as 'emb.{i}.weight' stands for one tensor per entry of the list at {i} in `ours`; a number there is one entry.
    Rows whose place the model does not have, because of its options, count for nothing.
    """

    theirs: str
    ours: str
    """Attributes from the model on, with '/' between them."""
    axes: tuple[int | None, ...]
    """For each axis of theirs the axis of ours that it is, None for one of size 1."""

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(1 if axis is None else shape[axis] for axis in self.axes)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        kept = [i for i, axis in enumerate(self.axes) if axis is not None]
        squeezed = array.reshape([array.shape[i] for i in kept])
        return squeezed.transpose(np.argsort([axis for axis in self.axes if axis is not None]))

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        transposed = array.transpose([axis for axis in self.axes if axis is not None])
        return transposed.reshape(self.their_shape(array.shape))


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the originals name the tensors of one kind of model."""

    layer: str
    """What the names of the tensors of the equilibrium layer, and only theirs, begin with."""
    rows: Sequence[Row]
    buffers: Mapping[str, Callable[[Any], np.ndarray]] = field(default_factory=dict)
    """Constants that the originals store besides, each a function of our model; they may be missing."""
    counters: Mapping[str, str] = field(default_factory=dict)
    """{last part of a tensor's name: of an integer stored beside it}, which means nothing to us and may be missing."""
    infer: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
    """The options of the model's config section that shapes by name tell; None for one that matters and that they do not."""


@dataclass(frozen=True)
class Slot:
    """One tensor of theirs, and the array of ours it goes into. Tied tensors go into the same."""

    theirs: str
    shape: tuple[int, ...]
    path: str
    """As in a checkpoint: nested keys with '/' between them."""
    row: Row


def slots(family: Family, model: nnx.Module) -> list[Slot]:
    """Every tensor that the originals store for such a model, buffers aside, in the table's order."""
    paths = {id(variable): "/".join(map(str, path)) for path, variable in nnx.to_flat_state(nnx.state(model))}
    found = []
    for row in family.rows:
        for substitutions, variable in _resolve(model, row.ours.split("/")):
            theirs = row.theirs.format(**substitutions)
            found.append(Slot(theirs, row.their_shape(variable.shape), paths[id(variable)], row))
    return found


def counters(family: Family, model: nnx.Module) -> list[str]:
    """The names of the integers that the originals count beside their tensors."""
    names = [slot.theirs.rpartition(".") for slot in slots(family, model)]
    return [f"{module}.{family.counters[leaf]}" for module, _, leaf in names if leaf in family.counters]


def match(family: Family, model: nnx.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors of these shapes from being this model's, as parts of a sentence; nothing if they are."""
    wanted = {slot.theirs: slot.shape for slot in slots(family, model)}
    buffers = {name: make(model).shape for name, make in family.buffers.items()}
    buffers |= dict.fromkeys(counters(family, model), ())
    unknown = [name for name in shapes if name not in wanted and name not in buffers]
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in shapes]
    misshapen = [
        f"{name} is {list(shapes[name])} and should be {list(shape)}"
        for name, shape in (wanted | buffers).items()
        if shapes.get(name, shape) != shape
    ]
    parts = {"unknown": unknown, "missing": missing, "of another shape": misshapen}
    return [f"{len(names)} {what}: {', '.join(names)}" for what, names in parts.items() if names]


def convert_tensors(family: Family, model: nnx.Module, file: TensorFile) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({path: float32 array of ours}, {name: buffer}) from a file that `match` found nothing wrong with.

    Raises:
      UserError: tensors that our model ties differ, a buffer is not what it should be, or elements are not finite numbers.
    """
    arrays: dict[str, np.ndarray] = {}
    first: dict[str, Slot] = {}
    untied, strange = [], []
    for slot in slots(family, model):
        if slot.path in first:
            other = first[slot.path].theirs
            if file.tensors[slot.theirs].same_elements(file.tensors[other]):
                continue
            if not np.array_equal(_read(file, slot, strange), arrays[slot.path]):
                untied.append(f"{other} and {slot.theirs}")
            continue
        first[slot.path] = slot
        arrays[slot.path] = _read(file, slot, strange)
    if untied:
        raise UserError(f"{file.path}: our model ties weights that differ there: {'; '.join(untied)}")
    beside = [*family.buffers, *counters(family, model)]
    buffers = {name: np.array(file.read(name)) for name in beside if name in file.tensors}
    strange += [name for name, make in family.buffers.items() if name in buffers and not _near(buffers[name], make(model))]
    if strange:
        raise UserError(f"{file.path} holds values that no trained model has, in {', '.join(strange)}: it may be damaged")
    return arrays, buffers


def export_tensors(
    family: Family, model: nnx.Module, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(their name, storage, array) for every tensor; tied ones name the same storage. `buffers`: those to prefer to our own."""
    for slot in slots(family, model):
        yield slot.theirs, slot.path, slot.row.to_theirs(arrays[slot.path])
    for name, make in family.buffers.items():
        yield name, name, np.asarray(buffers.get(name, make(model)))
    for name in counters(family, model):
        yield name, name, np.asarray(buffers.get(name, 0), np.int64)


def _resolve(node: Any, parts: Sequence[str]) -> Iterator[tuple[dict[str, int], nnx.Variable]]:
    """The variables that a path with placeholders means, with what was put for those."""
    if not parts:
        if node is not None:
            yield {}, node
        return
    head, rest = parts[0], parts[1:]
    if head.startswith("{"):
        for i, child in enumerate(node):
            for substitutions, variable in _resolve(child, rest):
                yield {head[1:-1]: i, **substitutions}, variable
    elif head.isdecimal():
        if int(head) < len(node):
            yield from _resolve(node[int(head)], rest)
    elif getattr(node, head, None) is not None:
        yield from _resolve(getattr(node, head), rest)


def _read(file: TensorFile, slot: Slot, strange: list[str]) -> np.ndarray:
    """A tensor as our array; adds its name to `strange` if its elements are not finite numbers."""
    array = file.read(slot.theirs)
    if array.dtype.kind in "iub":
        raise UserError(f"{file.path}: {slot.theirs} is of type {array.dtype}, not of floating numbers")
    ours = np.ascontiguousarray(slot.row.to_ours(array), np.float32)
    if not np.isfinite(ours).all():
        strange.append(slot.theirs)
    return ours


def _near(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.allclose(found.astype(np.float64), expected, rtol=1e-2 if found.dtype.itemsize == 2 else 1e-5, atol=0))
