"""Unpickle dictionaries of tensors as `torch.save` writes them, and nothing else.

`untrusted.pickles` interprets the pickle. What it may name is the table below, whose functions make a `Tensor` of a storage, or
nothing; any other name is refused. No module is imported, and no object of another class is created.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deq_flax.torch_checkpoint.tensors import BFLOAT16, FormatError, Storage, Tensor
from deq_flax.untrusted import pickles
from deq_flax.untrusted.files import shown

MAX_BYTES = 1 << 24
"""The largest pickle that is read; that of a state_dict has about 150 bytes a tensor."""

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

StorageMaker = Callable[[str, np.dtype, int], Storage]
"""Makes a storage from its key, its type and its number of elements."""


def unpickle(stream: io.BytesIO, make_storage: StorageMaker | None = None) -> Any:
    """The object of the pickle at the stream's position: dictionaries, lists, tuples, numbers, strings and `Tensor`s.

    Raises:
      FormatError: the pickle is damaged or holds something else; the message names a function that was refused.
    """
    try:
        return pickles.unpickle(stream, _TABLE, persistent_load=_References(make_storage), encoding="utf-8")
    except pickles.NameRefusedError as error:
        raise FormatError(
            f"asks for {shown(error.name)}, which no dictionary of tensors needs: refused, and nothing was run; "
            "if it holds a whole model, save model.state_dict() instead, with the code that wrote it"
        ) from error
    except pickles.PickleError as error:
        raise FormatError(f"holds a damaged pickle, or one that is no dictionary of tensors: {error}") from error


class _Dict(dict):
    """A dictionary that ignores the attributes it is given, such as the `_metadata` of a state_dict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    if not (isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise FormatError("holds a damaged pickle (a tensor without storage)")
    return Tensor(storage, offset, size, stride)


def _parameter(data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise FormatError("holds a damaged pickle (a parameter that is no tensor)")
    return data


def _of_type(function: Any, kind: Any, arguments: Any, *rest: Any) -> Tensor:
    if not isinstance(function, pickles.Named) or function.value not in (_tensor, _parameter):
        raise FormatError("holds a damaged pickle (a tensor that is not rebuilt by PyTorch)")
    return function.value(*arguments)


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, tuple | list):
        raise FormatError("holds a damaged pickle (a size that is none)")
    return tuple(sizes)


def _ignored(*arguments: Any) -> None:
    """Stub for values beside the tensors, which are not read."""


_TABLE: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda pairs=(): _Dict((pickles.checked(key), value) for key, value in pairs),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Tensor"): _ignored,
    ("torch.nn.parameter", "Parameter"): _ignored,
    ("torch", "Size"): _size,
    # Training scripts save scores beside a state_dict, as NumPy scalars.
    ("numpy.core.multiarray", "scalar"): _ignored,
    ("numpy._core.multiarray", "scalar"): _ignored,
    ("numpy", "dtype"): lambda *arguments: _Dict(),
    ("_codecs", "encode"): _ignored,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _References:
    """Makes the storages of a pickle's references, each once.

    A reference is ('storage', type, key, device, number of elements[, view]), whose view is None.
    """

    def __init__(self, make_storage: StorageMaker | None):
        self._make_storage = make_storage
        self._storages: dict[str, Storage] = {}

    def __call__(self, pid: Any) -> Storage:
        if self._make_storage is None or not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise FormatError("refers to something that is not a storage")
        _, kind, key, _, numel = pid[:5]
        dtype = kind.value if isinstance(kind, pickles.Named) else None
        if not isinstance(dtype, np.dtype) or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise FormatError("holds a damaged pickle (a storage that makes no sense)")
        if pid[5:] not in ((), (None,)):
            raise FormatError("holds views of storages as PyTorch wrote them before 0.4; save it again with a newer one")
        if key not in self._storages:
            self._storages[key] = self._make_storage(key, dtype, numel)
        storage = self._storages[key]
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise FormatError("holds a storage that is of two types or sizes at once")
        return storage
