"""Laws of the format: checkpoints of earlier formats restore, later ones are refused, and none is read unverified."""

import json
import pathlib
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax.checkpoints.loading import load_meta, load_params
from deq_flax.checkpoints.stored_step import FORMAT, RETIRED, DamagedError, read_record
from deq_flax.errors import UserError
from tests.checkpoints.saving import TEMPLATE, opened, save, save_three

W = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def format_1(tmp_path):
    """The checkpoints folder of a stored run, written when the format was 1."""
    with zipfile.ZipFile(pathlib.Path(__file__).with_name("format_1.zip")) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "checkpoints"


def rewrite(folder, change):
    """Change the stored record, its checksum included, as another version of the package would have written it."""
    path = folder / "meta" / "metadata"
    record = json.loads(path.read_text())
    del record["checksum"]
    change(record)
    text = json.dumps(record | {"checksum": zlib.crc32(json.dumps(record, sort_keys=True).encode())})
    path.write_text(text)


def test_format_1_restores_and_the_run_continues(format_1):
    rest = {"variables": {"norm": {"mean_C": jnp.zeros(3)}}, "opt_state": (jnp.zeros((2, 3)),), "skipped": jnp.int32(0)}
    params = {"cell": {"w_IO": jnp.zeros((2, 3))}}
    with opened(format_1) as checkpoints:
        restored = checkpoints.restore_latest(params=params, rest=rest, ema=params)
        assert save(checkpoints, 8, {"cell": {"w_IO": jnp.ones((2, 3))}}, 1.0)
        assert checkpoints.steps() == [7, 8] and checkpoints.best_step() == 8
    assert (restored.step, restored.meta["config"], restored.meta["metrics"]) == (7, {"task": "language"}, {"loss": 2.5})
    np.testing.assert_array_equal(restored.params["cell"]["w_IO"], W)
    np.testing.assert_array_equal(restored.eval_params["cell"]["w_IO"], W + 1)
    np.testing.assert_array_equal(restored.rest["variables"]["norm"]["mean_C"], W[0])
    np.testing.assert_array_equal(restored.rest["opt_state"][0], W / 2)
    assert int(restored.rest["skipped"]) == 1
    assert load_meta(format_1 / "7")["versions"]["format"] == 1


def test_a_retired_array_is_still_read_where_it_is_asked_for(format_1):
    (item, name), *_ = RETIRED
    with opened(format_1) as checkpoints:
        rest = {"variables": {"norm": {"mean_C": jnp.zeros(3)}}, "opt_state": (jnp.zeros((2, 3)),), "skipped": jnp.int32(0)}
        restored = checkpoints.restore(7, params={"cell": {"w_IO": jnp.zeros((2, 3))}}, **{item: rest | {name: jnp.int32(0)}})
    assert int(restored.rest[name]) == 4


@pytest.mark.parametrize("item", ["data", "meta"])
def test_the_checksum_of_format_1_covers_the_item_data_too(format_1, item):
    path = format_1 / "7" / item / "metadata"
    path.write_text(path.read_text().replace(" 7", " 6"))
    with pytest.raises(DamagedError, match="do not match their checksum"):
        read_record(format_1 / "7")


def test_the_format_that_is_written_is_named(tmp_path):
    assert load_meta(save_three(tmp_path))["versions"]["format"] == FORMAT == 2


def test_a_later_format_is_refused_in_one_line(tmp_path):
    folder = save_three(tmp_path) / "checkpoints" / "3"
    rewrite(folder, lambda record: record["versions"].update(format=FORMAT))
    assert load_params(folder, TEMPLATE).step == 3
    rewrite(folder, lambda record: record["versions"].update(format=FORMAT + 1))
    with pytest.raises(UserError, match="has format 3, and this deq_flax reads up to 2") as caught:
        load_params(folder, TEMPLATE)
    assert not isinstance(caught.value, DamagedError)


def test_a_window_of_averages_holds_numbers(tmp_path):
    folder = save_three(tmp_path) / "checkpoints" / "3"
    rewrite(folder, lambda record: record.update(window={"loss": [1.5, 2.0], "confusion": [[[1.0, 0.0], [2.0, 3.0]], 1.0]}))
    assert load_params(folder, TEMPLATE).meta["window"]["loss"] == [1.5, 2.0]
    for window in ([], {"loss": 3.0}, {"loss": [1.0]}, {"loss": [[1.0], [[], "x"]]}, {"loss": [None, {}]}):
        rewrite(folder, lambda record, window=window: record.update(window=window))
        with pytest.raises(DamagedError, match="not those of a checkpoint"):
            read_record(folder)
