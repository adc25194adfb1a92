"""Files for tests, valid and damaged."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent.parent / "data"
ODD, ODD_LEGACY = DATA / "torch" / "odd.pth", DATA / "torch" / "odd_legacy.pth"


def entries(path):
    """The entries of a zip file, {name: bytes}."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path, contents, compression=zipfile.ZIP_STORED):
    """Write a zip file of {name: bytes}; returns its path."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def write_pickle(path, data):
    """Write a file of torch.save with this pickle and no storages; returns its path."""
    return write_zip(path, {"x/data.pkl": data, "x/version": b"3\n"})


def write_safetensors(path, arrays, **changed):
    """Write a .safetensors file by hand; returns its path. `changed`: header entries to replace or add."""
    header, content = {}, b""
    kinds = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "bool": "BOOL", "bfloat16": "BF16"}
    for name, array in arrays.items():
        place = [len(content), len(content) + array.nbytes]
        header[name] = {"dtype": kinds[array.dtype.name], "shape": list(array.shape), "data_offsets": place}
        content += array.tobytes()
    text = json.dumps({"__metadata__": {"format": "pt"}} | header | changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def tensor_pickle(numel, offset, shape, strides, storage="FloatStorage"):
    """A pickle of {'w': tensor} on a storage '0'."""
    from deq_flax.torch_checkpoint.writer import _number, _text, _tuple

    kind = f"ctorch\n{storage}\n".encode()
    reference = _tuple([_text("storage"), kind, _text("0"), _text("cpu"), _number(numel)]) + b"Q"
    geometry = [_number(offset), _tuple(map(_number, shape)), _tuple(map(_number, strides))]
    arguments = _tuple([reference, *geometry, b"\x89", b"}"])
    return b"\x80\x02}" + _text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


class Evil:
    """An object that calls `function(*arguments)` when `pickle.load` reads it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def legacy(*objects):
    """The beginning of a file in torch.save's format before 1.6."""
    stream = io.BytesIO()
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    for x in (0x1950A86A20F9469CFC6C, 1001, machine, *objects):
        stream.write(x if isinstance(x, bytes) else pickle.dumps(x, protocol=2))
    return stream.getvalue()


def array(*shape, dtype=np.float32):
    """The numbers 0, 1, 2, ... in a shape."""
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)
