"""Unpickle dictionaries of tensors as `torch.save` writes them, and nothing else.

A pickle is a program. Its instructions are checked before it runs: those that could create objects of arbitrary classes or
claim memory are refused. The rest can call only functions that GLOBAL instructions name, each of which is replaced by a stub of
the table below; any other name is refused. No module is imported, and no object of another class is created.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deq_flax.torch_checkpoint.tensors import BFLOAT16, FormatError, Storage, Tensor

MAX_BYTES = 1 << 24
"""The largest pickle that is read; that of a state_dict has about 150 bytes a tensor."""

_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS "
    "GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET"
)
_ALLOWED = frozenset(_INSTRUCTIONS.split())

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


def unpickle(data: bytes, make_storage: StorageMaker | None = None) -> Any:
    """The object in a pickle that fills `data`: dictionaries, lists, tuples, numbers, strings and `Tensor`s.

    Raises:
      FormatError: the pickle is damaged or holds something else; the message names a function that was refused.
    """
    length = pickle_length(data)
    if length != len(data):
        raise FormatError("holds more after its pickle than it should")
    try:
        return _Unpickler(io.BytesIO(data), make_storage).load()
    except FormatError:
        raise
    except Exception as error:  # of any type, depending on where a damaged pickle fails
        raise FormatError(f"holds a damaged pickle ({type(error).__name__})") from error


def pickle_length(data: bytes) -> int:
    """The length in bytes of the pickle that `data` begins with.

    Raises:
      FormatError: there is no pickle, or it has instructions or names that are not allowed.
    """
    names, opcodes, end = [], [], 0
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST") and (*str(argument).split(" ", 1),) not in _GLOBALS:
                names.append(str(argument).replace(" ", "."))
            elif opcode.name not in _ALLOWED:
                opcodes.append(opcode.name)
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(argument)) > len(data):
                opcodes.append(f"{opcode.name} {argument}")
            end = (position or 0) + 1
    except Exception as error:  # of many types: the data is no pickle
        if not names:
            raise FormatError("holds a damaged pickle, or one that is cut off") from error
    if names:
        raise _refusal(names)
    if opcodes:
        raise FormatError(
            f"holds a pickle with instructions that no dictionary of tensors needs ({opcodes[0]}): nothing was run"
        )
    return end


def _refusal(names: list[str]) -> FormatError:
    shown = ", ".join(repr(name)[1:-1] for name in dict.fromkeys(names[:5]))
    return FormatError(
        f"asks for {shown}, which no dictionary of tensors needs: refused, and nothing was run; "
        "if it holds a whole model, save model.state_dict() instead, with the code that wrote it"
    )


class _Stub:
    """The replacement of a function that a pickle names."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]):
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise FormatError("sets attributes on a name")


class _StorageType:
    """The replacement of a storage class that a pickle names."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        raise FormatError("sets attributes on a name")


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


def _of_type(function: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
    if not isinstance(function, _Stub):
        raise FormatError("holds a damaged pickle (a tensor that is not rebuilt by PyTorch)")
    return function(*arguments)


def _ignored(*arguments: Any) -> None:
    """Stub for values beside the tensors, which are not read."""


_FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda *items: _Dict(*items),
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Tensor"): _ignored,
    ("torch.nn.parameter", "Parameter"): _ignored,
    ("torch", "Size"): lambda size=(): tuple(size),
    # Training scripts save scores beside a state_dict, as NumPy scalars.
    ("numpy.core.multiarray", "scalar"): _ignored,
    ("numpy._core.multiarray", "scalar"): _ignored,
    ("numpy", "dtype"): lambda *arguments: _Dict(),
    ("_codecs", "encode"): _ignored,
}
_GLOBALS = {*_FUNCTIONS, *(("torch", name) for name in STORAGES)}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, make_storage: StorageMaker | None):
        super().__init__(stream, encoding="utf-8")
        self._make_storage = make_storage
        self._storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _GLOBALS:
            raise _refusal([f"{module}.{name}"])
        return _StorageType(STORAGES[name]) if name in STORAGES else _Stub(_FUNCTIONS[module, name])

    def persistent_load(self, pid: Any, /) -> Storage:
        """The storage of a reference ('storage', type, key, device, number of elements[, view]), whose view is None."""
        if self._make_storage is None or not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise FormatError("refers to something that is not a storage")
        _, kind, key, _, numel = pid[:5]
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise FormatError("holds a damaged pickle (a storage that makes no sense)")
        if pid[5:] not in ((), (None,)):
            raise FormatError("holds views of storages as PyTorch wrote them before 0.4; save it again with a newer one")
        if key not in self._storages:
            self._storages[key] = self._make_storage(key, kind.dtype, numel)
        storage = self._storages[key]
        if (storage.dtype, storage.numel) != (kind.dtype, numel):
            raise FormatError("holds a storage that is of two types or sizes at once")
        return storage
