"""Tensors of the original models as arrays of our models, and back, by a table of names and layouts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx

from deq_flax.errors import UserError
from deq_flax.torch_checkpoint.reader import TensorFile
from deq_flax.untrusted.files import listed


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    A name such as 'emb.{i}.weight' stands for one tensor per entry of the list at {i} in `ours`; a number there is one entry.
    Rows whose attribute the model lacks, because of its options, are ignored.
    """

    theirs: str
    """Name in the original model."""
    ours: str
    """Attributes from our model on, with '/' between them."""
    axes: tuple[int | None, ...]
    """The axis of our array that each axis of the original tensor becomes, None for one of size 1, which is dropped."""

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The original's shape for an array of ours of this shape."""
        return tuple(1 if axis is None else shape[axis] for axis in self.axes)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """An original tensor in our layout."""
        kept = [i for i, axis in enumerate(self.axes) if axis is not None]
        squeezed = array.reshape([array.shape[i] for i in kept])
        return squeezed.transpose(np.argsort([axis for axis in self.axes if axis is not None]))

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """An array of ours in the original's layout."""
        transposed = array.transpose([axis for axis in self.axes if axis is not None])
        return transposed.reshape(self.their_shape(array.shape))


@dataclass(frozen=True, kw_only=True)
class Family:
    """The tensor names of one kind of original model."""

    layer: str
    """Prefix that the tensors of the equilibrium layer have, and no other tensor."""
    rows: Sequence[Row]
    """All tensors that are parameters or running statistics of our model."""
    buffers: Mapping[str, Callable[[Any], np.ndarray]] = field(default_factory=dict)
    """Constants that the originals store as well: name -> their value for a model of ours. A file may lack them."""
    counters: Mapping[str, str] = field(default_factory=dict)
    """Integers that the originals store beside a tensor and our models lack: last part of the tensor's name -> that of the
    integer's. A file may lack them."""
    infer: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]]
    """The options of our model that follow from tensor shapes by name; None for an option that must be given by the user."""


@dataclass(frozen=True)
class Slot:
    """One original tensor and the array of ours that holds it. Tied tensors share an array."""

    theirs: str
    """Name in the original model."""
    shape: tuple[int, ...]
    """Shape in the original model."""
    path: str
    """Path of our array in a checkpoint: nested keys with '/' between them."""
    row: Row


def slots(family: Family, model: nnx.Module) -> list[Slot]:
    """All tensors that the originals store for such a model, except buffers and counters, in the order of the table."""
    paths = {id(variable): path for path, variable in _variables(model)}
    found = []
    for row in family.rows:
        for substitutions, variable in _resolve(model, row.ours.split("/")):
            theirs = row.theirs.format(**substitutions)
            found.append(Slot(theirs, row.their_shape(variable.shape), paths[id(variable)], row))
    return found


def counters(family: Family, model: nnx.Module) -> list[str]:
    """The names of the family's counters for such a model."""
    names = [slot.theirs.rpartition(".") for slot in slots(family, model)]
    return [f"{module}.{family.counters[leaf]}" for module, _, leaf in names if leaf in family.counters]


def mismatches(family: Family, model: nnx.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The differences between tensors of these shapes and those of the model, as parts of a sentence; empty if they fit.

    Of many tensors the first are named.
    """
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
    return [f"{len(names)} {what}: {listed(names)}" for what, names in parts.items() if names]


def sized(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that have elements: the sizes of others may be anything, at no cost to the file."""
    return {name: shape for name, shape in shapes.items() if 0 not in shape}


def convert_tensors(family: Family, model: nnx.Module, file: TensorFile) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read all arrays of a model from a file without `mismatches`.

    Returns:
      ({path: float32 array of ours}, {name: buffer or counter of the file}).

    Raises:
      UserError: tensors that our model ties differ, a buffer has another value than the model's, or elements are not finite.
    """
    arrays: dict[str, np.ndarray] = {}
    first: dict[str, Slot] = {}
    untied: list[str] = []
    implausible: list[str] = []
    for slot in slots(family, model):
        if slot.path in first:
            other = first[slot.path].theirs
            if file.tensors[slot.theirs].same_elements(file.tensors[other]):
                continue
            if not np.array_equal(_read(file, slot, implausible), arrays[slot.path]):
                untied.append(f"{other} and {slot.theirs}")
            continue
        first[slot.path] = slot
        arrays[slot.path] = _read(file, slot, implausible)
    if untied:
        raise UserError(f"{file.path}: our model ties weights that differ there: {listed(untied)}")
    beside = [*family.buffers, *counters(family, model)]
    buffers = {name: np.array(file.read(name)) for name in beside if name in file.tensors}
    implausible += [name for name, make in family.buffers.items() if name in buffers and not _near(buffers[name], make(model))]
    if implausible:
        raise UserError(f"{file.path} holds values that no trained model has, in {listed(implausible)}: it may be damaged")
    return arrays, buffers


def export_tensors(
    family: Family, model: nnx.Module, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (original name, storage, array) for every tensor; tied tensors name the same storage.

    Args:
      family: the family whose names and layouts are written.
      model: a model with the options that `arrays` belong to.
      arrays: the arrays by path, as `get_arrays` gives them.
      buffers: values of buffers and counters to write; those that are absent take the model's value, and 0.
    """
    for slot in slots(family, model):
        yield slot.theirs, slot.path, slot.row.to_theirs(arrays[slot.path])
    for name, make in family.buffers.items():
        yield name, name, np.asarray(buffers.get(name, make(model)))
    for name in counters(family, model):
        yield name, name, np.asarray(buffers.get(name, 0), np.int64)


def get_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters and running statistics of a model, by path."""
    return {path: np.asarray(variable.get_value()) for path, variable in _variables(model)}


def set_arrays(model: nnx.Module, arrays: Mapping[str, Any]) -> None:
    """Set the parameters and running statistics of a model, of one with shapes alone too, by path."""
    for path, variable in _variables(model):
        variable.set_value(arrays[path])


def _variables(model: nnx.Module) -> list[tuple[str, nnx.Variable]]:
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return [("/".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]


def _resolve(node: Any, parts: Sequence[str]) -> Iterator[tuple[dict[str, int], nnx.Variable]]:
    """(values of the placeholders, variable) for every variable that a path with placeholders stands for."""
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


def _read(file: TensorFile, slot: Slot, implausible: list[str]) -> np.ndarray:
    """A tensor as our array; adds its name to `implausible` if an element is not finite."""
    array = file.read(slot.theirs)
    if array.dtype.kind in "iub":
        raise UserError(f"{file.path}: {slot.theirs} is of type {array.dtype}, not of floating numbers")
    ours = np.ascontiguousarray(slot.row.to_ours(array), np.float32)
    if not np.isfinite(ours).all():
        implausible.append(slot.theirs)
    return ours


def _near(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.allclose(found.astype(np.float64), expected, rtol=1e-2 if found.dtype.itemsize == 2 else 1e-5, atol=0))
