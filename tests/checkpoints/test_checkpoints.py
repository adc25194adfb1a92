"""Laws of checkpoints: a restore gives what was saved, or the next older intact one, or an error of one line."""

import json
import os
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deq_flax.checkpoints import stored_step
from deq_flax.checkpoints.checkpoints import CheckpointOptions, Checkpoints
from deq_flax.errors import UserError
from tests.checkpoints.saving import TEMPLATE, damage, files_of, opened, save, save_three


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "embed": {"w": jax.random.normal(keys[0], (30, 40))},
        "cell": {"b.0": jax.random.normal(keys[1], (5,), jnp.bfloat16)},
    }


def make_rest(params):
    return {
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params),
        "carry": (jnp.zeros((2, 0, 3)), jnp.arange(6, dtype=jnp.int32)),
        "key": jax.random.key_data(jax.random.key(1)),
        "skipped": np.int64(7),
        "flag": True,
        "none": None,
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, type(y)) and np.asarray(x).dtype == np.asarray(y).dtype and np.shape(x) == np.shape(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A folder with checkpoints at 1, 2, 3 of which 2 is the best."""
    return save_three(tmp_path) / "checkpoints"


def read_only(folder):
    return Checkpoints(folder, read_only=True)


def latest(checkpoints, params=TEMPLATE):
    return checkpoints.restore_latest(params=params, rest={})


def test_round_trip_is_bit_identical(tmp_path):
    params = make_params()
    rest = make_rest(params)
    templates = {"params": abstract(params), "rest": abstract(rest)}
    with opened(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(**templates) is None
        assert save(checkpoints, 5, params, float("nan"), rest=rest, meta={"config": {"a": [1, 2.5]}})
        restored = checkpoints.restore_latest(**templates)
    assert_same(restored.params, params)
    assert_same(restored.rest, rest)
    assert (restored.step, restored.meta["config"], restored.ema) == (5, {"a": [1, 2.5]}, None)


def test_a_checkpoint_holds_nothing_but_its_items(tmp_path):
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 1, ema={"w": jnp.ones(3)}, rest={"skipped": np.int32(0)})
    assert {path.name for path in (tmp_path / "1").iterdir() if path.is_dir()} == {"params", "rest", "ema", "meta"}


def test_arrays_may_be_donated_right_after_save(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with opened(tmp_path / "c", keep_latest=5) as checkpoints:
        host = np.arange(300_000, dtype=np.float32)
        for step in range(3):
            value = np.arange(300_000, dtype=np.float32) + step
            x, host[:] = jnp.array(value), value
            save(checkpoints, step, {"w": x, "host": host})
            overwrite(x).block_until_ready()
            host[:] = -1
        for step in range(3):
            template = {"w": jax.ShapeDtypeStruct((300_000,), jnp.float32), "host": host}
            restored = checkpoints.restore(step, params=template).params
            np.testing.assert_array_equal(restored["w"], np.arange(300_000) + step)
            np.testing.assert_array_equal(restored["host"], np.arange(300_000) + step)


def test_keeps_the_latest_and_the_best(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: None, 5: 2.0, 6: 4.0, 7: 3.0}
    for steps in ((1, 2, 3, 4), (5, 6, 7)):
        with opened(tmp_path / "c", keep_latest=2, keep_best=2) as checkpoints:
            for step in steps:
                save(checkpoints, step, {"w": jnp.ones(3)}, losses[step])
    assert read_only(tmp_path / "c").steps() == [2, 5, 6, 7]
    assert read_only(tmp_path / "c").best_step() == 2


def test_without_metrics_the_newest_is_best(tmp_path):
    with opened(tmp_path / "c", keep_latest=2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, {"w": jnp.full(3, step)})
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.restore_best(params={"w": jnp.zeros(3, int)}).step == 3


def test_saving_a_step_twice_changes_nothing(folder):
    with opened(folder) as checkpoints:
        assert not save(checkpoints, 3)
        assert float(checkpoints.restore(3, params=TEMPLATE).params["w"][0, 0]) != 0.0


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "meta", "item", "swapped"])
def test_a_damaged_checkpoint_is_named_and_the_next_older_used(folder, how, caplog):
    damage(folder / "3", how)
    with opened(folder) as checkpoints:
        assert latest(checkpoints).step == 2
        lines = [record.getMessage() for record in caplog.records if record.name == "deq_flax"]
        assert len(lines) == 1 and "checkpoints/3 is damaged" in lines[0] and "\n" not in lines[0]
        assert checkpoints.steps() == [1, 2]
        assert save(checkpoints, 3)
        assert latest(checkpoints).step == 3


def test_every_file_of_a_checkpoint_is_checked(folder):
    """A flipped byte anywhere either does no harm or is noticed."""
    good = np.asarray(read_only(folder).restore(3, params=TEMPLATE).params["w"])
    noticed = 0
    for path in files_of(folder / "3"):
        raw = path.read_bytes()
        for place in {0, len(raw) // 2, len(raw) - 1} if raw else ():
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
            restored = latest(read_only(folder))
            assert restored.step == 2 or np.array_equal(restored.params["w"], good)
            noticed += restored.step == 2
        path.write_bytes(raw)
    assert noticed > 5


def test_read_only_touches_nothing(folder):
    damage(folder / "3", "empty")
    before = sorted(folder.rglob("*"))
    checkpoints = read_only(folder)
    assert latest(checkpoints).step == 2
    with pytest.raises(UserError, match="read-only"):
        save(checkpoints, 4)
    assert sorted(folder.rglob("*")) == before


def test_no_intact_checkpoint_is_an_error_and_never_a_fresh_start(folder):
    for step in "123":
        damage(folder / step, "truncated")
    with pytest.raises(UserError, match="all 3 are damaged"):
        latest(opened(folder))
    assert read_only(folder).steps() == [1, 2, 3]


def test_an_interrupted_write_is_not_a_checkpoint(folder):
    (folder / "3").rename(folder / "3.orbax-checkpoint-tmp")
    with opened(folder) as checkpoints:
        assert latest(checkpoints).step == 2
        assert save(checkpoints, 3)
    assert read_only(folder).steps() == [1, 2, 3]


def test_a_misfit_names_what_differs(folder):
    template = {"w": jax.ShapeDtypeStruct((30, 41), jnp.float32), "b": jnp.zeros(2)}
    with pytest.raises(UserError) as caught:
        latest(read_only(folder), template)
    assert "w: file has float32[30, 40], this run needs float32[30, 41]" in str(caught.value)
    assert "b: file has nothing, this run needs float32[2]" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"\(rest\): extra"):
        read_only(folder).restore(3, params=TEMPLATE, rest={"extra": jnp.zeros(2)})


def test_missing_checkpoints_are_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        read_only(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint of step 8"):
        opened(tmp_path / "empty").restore(8, params=TEMPLATE)


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write checkpoints to"):
        opened(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize("options", [dict(keep_latest=0), dict(keep_best=-1)])
def test_the_numbers_of_checkpoints_to_keep_have_a_minimum(options):
    with pytest.raises(UserError, match=r"checkpoint.keep_latest must be at least 1, keep_best at least 0"):
        CheckpointOptions(**options)


def test_a_refused_write_is_one_line_and_keeps_the_older_checkpoint(folder):
    old_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = opened(folder, keep_latest=1, keep_best=0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(UserError, match=r"cannot write a checkpoint to .*File too large"):
            save(checkpoints, 4, {"w": jax.random.normal(jax.random.key(0), (500, 500))})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_signal)
    checkpoints.close()
    assert latest(read_only(folder)).step == 3


def test_restores_into_the_shardings_of_the_template(folder):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    template = {"w": jax.ShapeDtypeStruct((30, 40), jnp.float32, sharding=sharding)}
    restored = read_only(folder).restore(3, params=template).params["w"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, read_only(folder).restore(3, params=TEMPLATE).params["w"])


def test_typed_keys_are_refused(tmp_path):
    with opened(tmp_path) as checkpoints, pytest.raises(TypeError, match="key_data"):
        save(checkpoints, 1, {"key": jax.random.key(0)})


@pytest.mark.parametrize(("copied", "name"), [("3", "7"), ("2", "7"), ("2", "3")])
def test_a_copy_under_another_number_is_not_that_step(folder, copied, name, caplog):
    """The number in the record decides: a copied folder neither is continued from nor counts as the best."""
    shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(folder / copied, folder / name)
    assert latest(read_only(folder)).step == (2 if name == "3" else 3)
    assert f"checkpoints/{name} is damaged: it is a copy of the checkpoint of step {copied}" in caplog.text
    assert read_only(folder).best_step() == 2
    with pytest.raises(UserError, match="is a copy of"):
        read_only(folder).restore(int(name), params=TEMPLATE)


@pytest.mark.parametrize("name", ["007", "٣", "1" * 30])
def test_other_names_of_folders_are_no_steps(folder, name):
    shutil.copytree(folder / "2", folder / name)
    assert read_only(folder).steps() == [1, 2, 3] and latest(read_only(folder)).step == 3


def rewritten(folder, change):
    """Change the record of a checkpoint, its checksum included."""
    file = folder / "meta" / "metadata"
    record = json.loads(file.read_text())
    del record["checksum"]
    record = change(record)
    file.write_text(json.dumps(record | {"checksum": stored_step._json_checksum(record)}))


WRONG = ([], None, "x", {}, -1, 10**400, 2.5)


@pytest.mark.parametrize("key", ["step", "metrics", "arrays", "params", "w", "shape", "dtype", "crc32", "loss", "versions"])
def test_a_record_of_other_types_is_damage(folder, key):
    """Also one whose checksum is right."""

    def changed(tree, value):
        if not isinstance(tree, dict):
            return tree
        return {name: value if name == key else changed(x, value) for name, x in tree.items()}

    whole = (folder / "3" / "meta" / "metadata").read_text()
    for value in WRONG:
        if (key, value) in (("metrics", None), ("metrics", {}), ("loss", 2.5)):
            continue
        rewritten(folder / "3", lambda record, value=value: changed(record, value))
        try:
            assert latest(read_only(folder)).step == 2, value
        except UserError as error:  # a record that might be of another model
            assert "does not fit this config" in str(error) and key in ("params", "shape", "dtype")
        assert read_only(folder).best_step() == 2
        (folder / "3" / "meta" / "metadata").write_text(whole)


def test_deep_records_and_metadata_are_damage(folder):
    for name in ("meta/metadata", "params/_METADATA"):
        file = folder / "3" / name
        whole = file.read_bytes()
        for content in (b"[" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900, b"[]", b"null", b"\xff", b""):
            file.write_bytes(content)
            assert latest(read_only(folder)).step == 2
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["meta/metadata", "params/_METADATA", "params/manifest.ocdbt"])
def test_pipes_and_devices_in_a_checkpoint_are_damage(folder, name):
    file = folder / "3" / name
    file.unlink()
    os.mkfifo(file)
    assert latest(read_only(folder)).step == 2
    file.unlink()
    file.symlink_to("/dev/zero")
    assert latest(read_only(folder)).step == 2


def test_flipped_bits_in_the_metadata_of_arrays_are_noticed_or_harmless(folder):
    good = np.asarray(read_only(folder).restore(3, params=TEMPLATE).params["w"])
    file, random = folder / "3" / "params" / "_METADATA", np.random.default_rng(0)
    whole = file.read_bytes()
    for place in random.permutation(8 * len(whole))[:40]:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        restored = latest(read_only(folder))
        assert restored.step == 2 or np.array_equal(restored.params["w"], good)
