"""Random damage: a file gives its tensors bit for bit or one UserError, never another exception.

Zip files have checksums. The other formats do not, so that a changed number in them is another number: damage to their
structure either is an error or leaves a dictionary of arrays, and a truncated file is always an error.
"""

import numpy as np
import pytest

from deq_flax.errors import UserError
from deq_flax.torch_checkpoint import open_tensors
from tests.torch_checkpoint.files import ODD, ODD_LEGACY, array, write_safetensors


def read(path):
    """The tensors, {name: (type, shape, bytes)}, or None if the file is refused."""
    try:
        with open_tensors(path) as file:
            arrays = {name: file.read(name) for name in file.tensors}
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}


def damaged(data, random):
    """`data` truncated, with a part removed, repeated or zeroed, or with one to four bytes changed."""
    kind, place = random.integers(6), int(random.integers(len(data)))
    end = min(len(data), place + int(random.integers(1, 200)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[end:]
    if kind == 2:
        return data[:end] + data[place:]
    if kind == 3:
        return data[:place] + bytes(end - place) + data[end:]
    out = bytearray(data)
    for place in random.integers(len(data), size=random.integers(1, 5)):
        out[place] ^= int(random.integers(1, 256))
    return bytes(out)


def test_damaged_zip_files_give_the_right_tensors_or_an_error(tmp_path):
    random, whole, path = np.random.default_rng(0), ODD.read_bytes(), tmp_path / "damaged.pth"
    right, outcomes = read(ODD), []
    for _ in range(300):
        path.write_bytes(damaged(whole, random))
        found = read(path)
        assert found is None or found == right
        outcomes.append(found is None)
    assert 0.3 < np.mean(outcomes) < 1, "much of this file is padding"


@pytest.mark.parametrize("form", ["legacy", "safetensors", "npz"])
def test_other_damaged_files_give_arrays_or_an_error(tmp_path, form):
    random, path = np.random.default_rng(1), tmp_path / "damaged"
    if form == "legacy":
        whole = ODD_LEGACY.read_bytes()
    elif form == "safetensors":
        whole = write_safetensors(path, {"a": array(2, 3), "b": array(4, dtype=np.int64)}).read_bytes()
    else:
        np.savez_compressed(tmp_path / "x.npz", a=array(2, 3), b=array(20, 3))
        whole = (tmp_path / "x.npz").read_bytes()
    for _ in range(100):
        path.write_bytes(damaged(whole, random))
        read(path)
