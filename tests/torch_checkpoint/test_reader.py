"""Reading: tensors that PyTorch wrote come back bit for bit, from every format."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from deq_flax.torch_checkpoint import open_tensors, write_state_dict
from tests.torch_checkpoint.files import DATA, ODD, ODD_LEGACY, array, entries, write_safetensors, write_zip

FIXTURES = ["lm_deq_postln", "lm_deq_preln", "lm_deq_local", "lm_deq_div1", "lm_deq_nocut", "lm_tdeq_postln"]
ARANGE = np.arange(12, dtype=np.float32).reshape(3, 4)
VIEWS = {"whole": ARANGE, "transposed": ARANGE.T, "part": ARANGE[1:, ::2]}
OTHERS = {"expanded": np.full((2, 3), 7.0), "scalar": np.array(2.5), "empty": np.zeros((0, 3)), "bool": [True, False, True]}


def read(path):
    with open_tensors(path) as file:
        return {name: np.array(file.read(name)) for name in file.tensors}


def same(a, b):
    assert set(a) == set(b)
    for name, x in b.items():
        assert a[name].dtype == x.dtype and a[name].shape == x.shape and a[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("name", FIXTURES)
def test_the_authors_files_hold_what_pytorch_reads_from_them(name):
    found = read(DATA / "reference" / f"{name}.pth")
    with np.load(DATA / "reference" / f"{name}_weights.npz") as weights:  # each storage once
        same({key: found[key] for key in weights}, dict(weights))
        assert all("crit.out_" in key for key in found.keys() - set(weights))


@pytest.mark.parametrize("path", [ODD, ODD_LEGACY])
def test_types_and_views_are_read_and_other_entries_ignored(path):
    found = read(path)
    for kind in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"):
        dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
        assert found[kind].dtype == dtype
        np.testing.assert_array_equal(found[kind], np.arange(6).reshape(2, 3).astype(dtype))
    for name, expected in (VIEWS | OTHERS).items():
        assert found[name].shape == np.shape(expected)
        np.testing.assert_array_equal(found[name], expected)
    assert found["parameter"].shape == (2,) and found["bool"].dtype == np.bool_
    assert len(found) == 9 + len(VIEWS) + len(OTHERS) + 1


def test_views_of_one_storage_are_known_as_such():
    with open_tensors(ODD) as file:
        whole, transposed, part = (file.tensors[name] for name in VIEWS)
        assert whole.storage is transposed.storage is part.storage
        assert whole.same_elements(whole) and not whole.same_elements(transposed)


def test_both_forms_of_weight_normalization_read_alike():
    found = read(DATA / "torch" / "weight_norm.pth")
    assert set(found) == {f"{layer}.{leaf}" for layer in ("old", "new") for leaf in ("weight_g", "weight_v", "bias")}
    for leaf in ("weight_g", "weight_v"):
        np.testing.assert_array_equal(found[f"old.{leaf}"], found[f"new.{leaf}"])


def test_a_big_endian_file_reads_the_same(tmp_path):
    contents = entries(DATA / "reference" / "lm_deq_nocut.pth")
    swapped = {name: np.frombuffer(x, ">f4").astype("<f4").tobytes() if "/data/" in name else x for name, x in contents.items()}
    swapped["lm_deq_nocut/byteorder"] = b"big"
    same(read(write_zip(tmp_path / "big.pth", swapped)), read(DATA / "reference" / "lm_deq_nocut.pth"))


def test_files_older_than_the_byte_order_record_are_little_endian(tmp_path):
    contents = {name: x for name, x in entries(ODD).items() if not name.endswith("byteorder")}
    same(read(write_zip(tmp_path / "old.pth", contents)), read(ODD))


def test_safetensors_and_npz_hold_the_same(tmp_path):
    arrays = {"a": array(2, 3), "b": array(3, 4, dtype=np.float64), "c": array(2, dtype=np.int64), "d": array(0, 2)}
    half = {"half": array(5).astype(ml_dtypes.bfloat16)}
    same(read(write_safetensors(tmp_path / "x.safetensors", arrays | half)), arrays | half)
    save_file(arrays | half, tmp_path / "y.safetensors")
    same(read(tmp_path / "y.safetensors"), arrays | half)
    columns = {"columns": np.asfortranarray(arrays["b"]), "big": arrays["a"].astype(">f4")}
    np.savez_compressed(tmp_path / "x.npz", **arrays, **columns)
    same(read(tmp_path / "x.npz"), arrays | {"columns": arrays["b"], "big": arrays["a"]})


def test_writing_is_deterministic_and_reads_back(tmp_path):
    arrays = {"a": array(2, 3), "b": array(3), "s": np.array(1.5, np.float32), "h": array(2, 2).astype(ml_dtypes.bfloat16)}
    triples = [*((name, name, x) for name, x in arrays.items()), ("tied", "a", arrays["a"])]
    for name in ("one", "two"):
        write_state_dict(tmp_path / name, triples)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    same(read(tmp_path / "one"), arrays | {"tied": arrays["a"]})
    with open_tensors(tmp_path / "one") as file:
        assert file.tensors["a"].same_elements(file.tensors["tied"])
