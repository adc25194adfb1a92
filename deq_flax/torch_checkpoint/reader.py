"""Open a file of named tensors in any known format."""

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deq_flax.torch_checkpoint.archive import Archive
from deq_flax.torch_checkpoint.other_formats import read_npz, read_safetensors
from deq_flax.torch_checkpoint.tensors import FormatError, Tensor, check_total, readable
from deq_flax.torch_checkpoint.torch_formats import LEGACY_START, read_legacy, read_zip
from deq_flax.untrusted.files import check_regular, listed

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save a state_dict among other values, the most common first."""

_PARAMETRIZED = {"original0": "g", "original1": "v"}
"""The end of a name that PyTorch's newer weight normalization gives, and that of the older."""


class TensorFile:
    """The tensors of an open file by name. Shapes are known, elements are read on demand, in a `with` block.

    Attributes:
      path: the file.
      tensors: `Tensor` by name, in the order of the file. A prefix 'module.' of all names is removed, and weight
        normalization is spelled `weight_g`, `weight_v` where the file has `parametrizations.weight.original0` and `1`.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], files: contextlib.ExitStack):
        self.path, self.tensors, self._files = path, dict(tensors), files

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The elements of a tensor, read-only. UserError: they cannot be read, or the file is damaged there."""
        with readable(self.path):
            return self.tensors[name].read()


def open_tensors(path: str | Path) -> TensorFile:
    """Open a file of torch.save (.pth, .pt, .pkl; either format), a .safetensors or an .npz file, recognized by its content.

    Nothing in the file is executed, and memory use is bounded by the size of the file. Zip files (torch.save since 1.6, .npz)
    have checksums, so that a changed byte is detected; in the other formats only a changed structure is.

    Raises:
      UserError: there is no such file, it is damaged, or it is not a dictionary of tensors.
    """
    path = Path(path)
    with readable(path), contextlib.ExitStack() as files:
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(len(LEGACY_START))
        if start.startswith(b"PK"):
            archive = files.enter_context(contextlib.closing(Archive(path)))
            is_npz = bool(archive.sizes) and all(name.endswith(".npy") for name in archive.sizes)
            tensors = read_npz(archive) if is_npz else _state_dict(read_zip(archive))
        elif start == LEGACY_START:
            tensors = _state_dict(read_legacy(path))
        elif start[8:9] == b"{":
            tensors = read_safetensors(path, files)
        else:
            raise FormatError(_why_unknown(start))
        check_total(tensors)
        return TensorFile(path, _renamed(tensors), files.pop_all())


def _why_unknown(start: bytes) -> str:
    """A message about a file of no known format that begins with `start`."""
    known = "a file of torch.save, .safetensors or .npz is needed"
    if start.startswith(b"\x80"):
        return f"is a pickle, but not one of torch.save (or its first bytes are damaged): {known}"
    return f"is empty or cut off: {known}" if len(start) < len(LEGACY_START) else f"is of no format that is read here: {known}"


def _state_dict(found: Any) -> dict[str, Tensor]:
    """The dictionary of tensors in the saved object. FormatError: there is none, or it holds other entries too."""
    if not isinstance(found, dict):
        raise FormatError(f"holds a {type(found).__name__}, not a state_dict: save model.state_dict()")
    for key in NESTED:
        if isinstance(found.get(key), dict) and any(isinstance(value, Tensor) for value in found[key].values()):
            found = found[key]
            break
    if not any(isinstance(value, Tensor) for value in found.values()):
        raise FormatError(f"holds no state_dict, but a dictionary of {listed(found) or 'nothing'}: save model.state_dict()")
    strange = [key for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise FormatError(f"holds entries that are no tensors ({listed(strange)}): save model.state_dict() alone")
    return found


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that `TensorFile` promises. FormatError: two would have the same."""
    names = list(tensors)
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    names = list(map(_spelled, names))
    if len(set(names)) != len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise FormatError(f"holds the same weights under two names: {listed(twice)}")
    return dict(zip(names, tensors.values(), strict=True))


def _spelled(name: str) -> str:
    """A name with weight normalization spelled the older way."""
    *parents, middle, leaf, end = ("", "", *name.split("."))
    if middle != "parametrizations" or end not in _PARAMETRIZED:
        return name
    return ".".join([*parents[2:], f"{leaf}_{_PARAMETRIZED[end]}"])
