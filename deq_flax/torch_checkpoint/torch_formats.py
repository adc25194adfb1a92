"""Readers of both formats of `torch.save`: zip files (since PyTorch 1.6), and before, pickles followed by raw storages.

No package but PyTorch itself reads them, and nothing else here needs PyTorch.
"""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np

from deq_flax.torch_checkpoint.archive import Archive
from deq_flax.torch_checkpoint.restricted_pickle import MAX_BYTES, unpickle
from deq_flax.torch_checkpoint.tensors import FormatError, Storage, read_at, swap_bytes
from deq_flax.untrusted.files import shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
_LEGACY_PROTOCOL = 1001


def read_zip(archive: Archive) -> Any:
    """The object in a zip file of `torch.save`. FormatError: the file is something else, or damaged."""
    pickles = [name for name in archive.sizes if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise FormatError("is a zip file, but neither one of torch.save (no data.pkl) nor an .npz file of arrays")
    root = pickles[0].split("/")[0]
    if f"{root}/constants.pkl" in archive.sizes:
        raise FormatError("is a TorchScript program: save the state_dict of the model that it was made from")
    order = "little"
    if f"{root}/byteorder" in archive.sizes:
        order = archive.read(f"{root}/byteorder", limit=16).decode("ascii", "replace")
    if order not in ("little", "big"):
        raise FormatError(f"states an unknown byte order ({order!r})")

    def make_storage(key: str, dtype: np.dtype, numel: int) -> Storage:
        name = f"{root}/data/{key}"
        if archive.sizes.get(name) != numel * dtype.itemsize:
            held = archive.sizes.get(name, "no")
            needed = shown(numel * dtype.itemsize)
            raise FormatError(f"is damaged: {shown(name)!r} should have {needed} bytes and has {held}")

        def read() -> np.ndarray:
            raw = archive.read_array(name)
            return swap_bytes(raw, dtype.itemsize) if order == "big" else raw

        return Storage(dtype, numel, read)

    stream = io.BytesIO(archive.read(pickles[0], limit=MAX_BYTES))
    found = unpickle(stream, make_storage)
    if stream.read(1):
        raise FormatError("holds more after its pickle than it should")
    return found


def read_legacy(path: Path) -> Any:
    """The object in a file of `torch.save` before 1.6.

    Layout: pickles of a magic number, a version, properties of the machine, the object, and the keys of its storages; then
    every storage in the order of the keys, as its number of elements (int64) and the elements. There are no checksums.

    Raises:
      FormatError: the file is damaged, or of another version or byte order.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_BYTES))
        magic, version, machine = (unpickle(head) for _ in range(3))
        if magic != LEGACY_MAGIC or version != _LEGACY_PROTOCOL:
            raise FormatError(f"is of a version of torch.save that is not known ({shown(version)})")
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise FormatError("was written on a big-endian machine: save it again with a newer PyTorch, which says so per file")
        storages: dict[str, list[int]] = {}

        def make_storage(key: str, dtype: np.dtype, numel: int) -> Storage:
            place = storages.setdefault(key, [0, numel, dtype.itemsize])
            return Storage(dtype, numel, lambda: read_at(path, place[0], numel * dtype.itemsize))

        found, keys = unpickle(head, make_storage), unpickle(head)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
            raise FormatError("is damaged: the storages it lists are not those of its tensors")
        start = head.tell()
        for key in keys:
            _, numel, itemsize = storages[key]
            storages[key][0] = start + 8
            start += 8 + numel * itemsize
            if start > size:
                raise FormatError("is cut off")
            file.seek(storages[key][0] - 8)
            if struct.unpack("<q", file.read(8)) != (numel,):
                raise FormatError("is damaged: a storage is not of the size that its tensors need")
    if start != size:
        raise FormatError(f"is damaged: {size - start} bytes are left over at its end")
    return found
