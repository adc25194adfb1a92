"""Refusals: a file that is not a dictionary of tensors is one UserError with the reason, and nothing in it is executed."""

import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest

from deq_flax.errors import UserError
from deq_flax.torch_checkpoint import open_tensors
from tests.torch_checkpoint import files
from tests.torch_checkpoint.files import DATA, ODD, ODD_LEGACY, Evil, legacy, write_pickle, write_safetensors, write_zip


def refused(path, words):
    """Check that opening or reading `path` fails with one line that names it and contains `words`."""
    with pytest.raises(UserError) as caught, open_tensors(path) as file:
        for name in file.tensors:
            file.read(name)
    message = str(caught.value)
    assert str(path) in message and words in message and "\n" not in message, message


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run_it(tmp_path, protocol, form):
    proof = tmp_path / "executed"
    data = pickle.dumps({"w": Evil(os.system, f"touch {proof}")}, protocol=protocol)
    path = tmp_path / "evil.pth"
    if form == "zip":
        write_pickle(path, data)
    else:
        path.write_bytes(legacy(data, []))
    refused(path, f"{os.system.__module__}.system")
    assert not proof.exists()
    pickle.loads(data)
    assert proof.exists(), "the pickle would have run"


@pytest.mark.parametrize("function", [eval, exec, __import__, getattr, open, np.load, pickle.loads])
def test_every_other_function_is_refused_by_name(tmp_path, function):
    refused(write_pickle(tmp_path / "x.pth", pickle.dumps(Evil(function, "1"), protocol=2)), function.__name__)


def test_instructions_that_build_objects_are_refused(tmp_path):
    for code, name in [(b"(ccollections\nOrderedDict\no.", "OBJ"), (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ")]:
        refused(write_pickle(tmp_path / "x.pth", code), name)
    refused(write_pickle(tmp_path / "x.pth", b"(S'ls'\nios\nsystem\n."), "os.system")
    refused(write_pickle(tmp_path / "x.pth", b"\x80\x02\x82\x01."), "EXT1")
    attributes = files.tensor_pickle(0, 0, (0,), (1,))[:-2] + b"}bs."
    refused(write_zip(tmp_path / "x.pth", {"x/data.pkl": attributes, "x/data/0": b""}), "attributes on a tensor")


def test_a_whole_model_is_refused_with_advice():
    refused(DATA / "torch" / "whole_model.pth", "torch.nn.modules.linear.Linear")
    refused(DATA / "torch" / "whole_model.pth", "save model.state_dict() instead")


def test_a_pickle_cannot_claim_memory(tmp_path):
    start = time.perf_counter()
    refused(write_pickle(tmp_path / "memo.pth", b"\x80\x02}r\xff\xff\xff\x7f."), "LONG_BINPUT")
    refused(write_pickle(tmp_path / "bytes.pth", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."), "damaged pickle")
    refused(write_pickle(tmp_path / "array.pth", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."), "damaged pickle")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "geometry",
    [
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, 0, (2, 2), (3, 1)),
        (4, -1, (2,), (1,)),
        (4, 0, (-2,), (1,)),
        (4, 3, (2,), (-1,)),
        (4, 0, (2, 2), (1,)),
        (4, 5, (0,), (1,)),
        (4, 0, (1,) * 9, (1,) * 9),
    ],
)
def test_a_tensor_reaches_no_further_than_its_storage(tmp_path, geometry):
    contents = {"x/data.pkl": files.tensor_pickle(*geometry), "x/data/0": bytes(16)}
    refused(write_zip(tmp_path / "x.pth", contents), "tensor of")


def test_a_storage_has_the_size_that_its_tensors_state(tmp_path):
    contents = {"x/data.pkl": files.tensor_pickle(4, 0, (4,), (1,)), "x/data/0": bytes(15)}
    refused(write_zip(tmp_path / "x.pth", contents), "should have 16 bytes and has 15")
    del contents["x/data/0"]
    refused(write_zip(tmp_path / "x.pth", contents), "has no")


def test_expanded_tensors_cannot_be_a_bomb(tmp_path):
    contents = {"x/data.pkl": files.tensor_pickle(1, 0, (1 << 15, 1 << 15), (0, 0)), "x/data/0": bytes(4)}
    refused(write_zip(tmp_path / "x.pth", contents), "bytes of tensors, but holds 4")


def test_zip_bombs_are_refused_unopened(tmp_path):
    n = 1 << 25
    contents = {"x/data.pkl": files.tensor_pickle(n, 0, (n,), (1,)), "x/data/0": bytes(4 * n)}
    path = write_zip(tmp_path / "bomb.pth", contents, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2e5
    refused(path, "refused, and nothing was unpacked")
    refused(write_zip(tmp_path / "pickle.pth", {"x/data.pkl": bytes(1 << 25)}, zipfile.ZIP_DEFLATED), "more than")


def test_an_entry_that_is_longer_than_it_states_is_refused(tmp_path):
    content = {"x/data.pkl": files.tensor_pickle(4, 0, (4,), (1,)), "x/data/0": bytes(1 << 20)}
    path = write_zip(tmp_path / "x.pth", content, zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 1 << 20), struct.pack("<I", 16)))
    refused(path, "damaged")


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    path = write_zip(tmp_path / "x.pth", {"x/data.pkl": files.tensor_pickle(4, 0, (4,), (1,)), "x/data/0": bytes(16)})
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    directory, end = data[start : data.index(b"PK\x05\x06")], bytearray(data[data.index(b"PK\x05\x06") :])
    many = b"".join(directory.replace(b"x/data/0", b"x/d%05d" % i) for i in range(500))
    struct.pack_into("<HHI", end, 8, 1000, 1000, len(many))
    path.write_bytes(data[:start] + many + end)
    refused(path, "the same name")


def test_byte_orders(tmp_path):
    contents = files.entries(ODD)
    refused(write_zip(tmp_path / "x.pth", contents | {"odd/byteorder": b"middle"}), "unknown byte order")
    little = ODD_LEGACY.read_bytes()
    place = little.index(b"little_endian") + len(b"little_endian") + 2
    assert little[place : place + 1] == b"\x88"
    (tmp_path / "big.pth").write_bytes(little[:place] + b"\x89" + little[place + 1 :])
    refused(tmp_path / "big.pth", "big-endian")


def test_arrays_of_objects_are_refused(tmp_path):
    proof = tmp_path / "executed"
    np.savez(tmp_path / "x.npz", a=np.array([Evil(os.system, f"touch {proof}")], object), allow_pickle=True)
    refused(tmp_path / "x.npz", "arrays of objects are refused")
    np.savez(tmp_path / "y.npz", a=np.zeros(2, [("p", "f4"), ("q", "f4")]))
    refused(tmp_path / "y.npz", "only numbers are read")
    assert not proof.exists()


@pytest.mark.parametrize("form", [ODD, ODD_LEGACY, "safetensors"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, form):
    path = write_safetensors(tmp_path / "x", {"a": files.array(2, 3)}) if form == "safetensors" else form
    whole, cut = path.read_bytes(), tmp_path / "cut.pth"
    for length in [*range(0, 40, 3), *range(40, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        refused(cut, "")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "invalid offset"),
        ({"b": {"dtype": "F32", "shape": [1], "data_offsets": [40, 44]}}, "invalid offset for tensor `b`"),
        ({"b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 28]}}, "invalid shape, data type, or offset"),
        ({"b": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [24, 24]}}, "overflow"),
        ({"b": {"dtype": "F32", "shape": [-1], "data_offsets": [24, 28]}}, "invalid value"),
        ({"b": {"dtype": "F32", "shape": [1], "data_offsets": [24, 28]}}, "is damaged or cut off"),
        ({"b": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [24, 28]}}, "cut off"),
        ({"b": [1]}, "invalid type"),
    ],
)
def test_safetensors_headers_are_checked(tmp_path, changed, words):
    refused(write_safetensors(tmp_path / "x.safetensors", {"a": files.array(2, 3)}, **changed), words)


def test_safetensors_of_other_types_or_too_many_axes_are_refused(tmp_path):
    entry = {"dtype": "F8_E4M3", "shape": [1, 1], "data_offsets": [0, 2]}
    path = write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(2, bool)}, a=entry | {"shape": [2]})
    refused(path, "holds 'a' as 'F8_E4M3'; known types: F64")
    path = write_safetensors(
        tmp_path / "x.safetensors", {"a": np.zeros(2, bool)}, a=entry | {"dtype": "BOOL", "shape": [2] + [1] * 8}
    )
    refused(path, "impossible geometry")


def test_a_safetensors_file_cut_off_while_it_is_open_is_an_error(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", {"a": files.array(1 << 16)})
    with open_tensors(path) as file:
        os.truncate(path, 1 << 12)
        with pytest.raises(UserError, match="is damaged or cut off"):
            file.read("a")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x"
    refused(path, "there is no file")
    for content, words in [
        (b"", "empty"),
        (b"hello world, this is text", "no format"),
        (pickle.dumps({"a": 1}), "not one of torch.save"),
        (struct.pack("<Q", 1 << 60) + b"{}    ", "header too large"),
        (struct.pack("<Q", 6) + b"{]    ", "invalid JSON"),
        (legacy({"a": 1}, []), "no state_dict"),
        (legacy({"a": 1}, [], b"more"), "left over"),
    ]:
        path.write_bytes(content)
        refused(path, words)
    refused(write_zip(path, {"readme.txt": b"x"}), "no data.pkl")
    refused(write_pickle(path, pickle.dumps([1, 2], protocol=2)), "holds a list")
    refused(write_pickle(path, pickle.dumps({"lr": 1, "args": 2}, protocol=2)), "a dictionary of lr, args")
    refused(write_zip(path, {"x/data.pkl": b"\x80\x02}.", "x/constants.pkl": b""}), "TorchScript")
    refused(tmp_path, "cannot be read")


W = files.tensor_pickle(4, 0, (4,), (1,))[3:-2]
"""The instructions for the entry 'w', without the dictionary around them."""


def test_nested_keys_and_copies_without_end_are_refused(tmp_path):
    deep = b"K\x01" + b"\x85" * 50_000
    pairs = b"](" + b"K\x01N\x86" * 1000 + b"eq\x00"
    copies = pairs + b"ccollections\nOrderedDict\nh\x00\x85R" * 500 + b"."
    for data, words in ((b"\x80\x02}" + deep + b"Ns.", "neither text nor a number"), (copies, "copies more than it holds")):
        refused(write_pickle(tmp_path / "x.pth", data), words)
        (tmp_path / "legacy.pth").write_bytes(legacy(data, []))
        refused(tmp_path / "legacy.pth", words)


def test_keys_of_other_types_are_named_briefly(tmp_path):
    for key in (7, 10**70, None, 2.5):
        data = pickle.dumps({key: 1}, protocol=2)[:-1] + W + b"s."
        refused(write_zip(tmp_path / "x.pth", {"x/data.pkl": data, "x/data/0": bytes(16)}), "no tensors")
    refused(write_pickle(tmp_path / "x.pth", pickle.dumps({10**5000: 1}, protocol=2)), "an integer of 16610 bits")


@pytest.mark.parametrize("name", ["a" * 1_000_000, "parametrizations." * 60_000, "." * 1_000_000])
def test_a_long_name_is_refused_at_once_and_not_repeated(tmp_path, name):
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        open_tensors(write_safetensors(tmp_path / "x.safetensors", {name: files.array(2)}))
    assert "characters" in str(caught.value) and len(str(caught.value)) < 500 and time.process_time() - start < 5


def test_sizes_of_nothing_may_not_be_giant(tmp_path):
    for shape in ((10**13, 0), (0, 10**30), (2**30, 2**30, 0)):
        contents = {"x/data.pkl": files.tensor_pickle(4, 0, (0,), (1,)), "x/data/0": bytes(16)}
        if max(shape) < 2**63:
            contents["x/data.pkl"] = files.tensor_pickle(4, 0, shape, (1,) * len(shape))
            refused(write_zip(tmp_path / "x.pth", contents), "impossible geometry")
        np.savez(tmp_path / "x.npz", a=np.zeros(1))
        head = (
            np.lib.format.magic(1, 0)
            + struct.pack("<H", 118)
            + f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode()
            + b"\n"
        )
        refused(write_zip(tmp_path / "x.npz", {"a.npy": head}), "impossible geometry")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_claim_memory_are_refused(tmp_path, method):
    refused(write_zip(tmp_path / "x.pth", files.entries(ODD), method), "a compression that neither")


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a file")
    refused("/dev/zero", "not a file")
