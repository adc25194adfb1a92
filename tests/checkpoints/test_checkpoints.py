"""Laws of checkpoints: what comes back is what was saved, or the next older whole one, or one clear line."""

import logging
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deq_flax.checkpoints.checkpoints import Checkpoints, load_meta, load_params
from deq_flax.errors import UserError

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the failures that these tests provoke


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
def saved(tmp_path):
    """A workdir with checkpoints at 1, 2, 3 of which 2 is the best."""
    params = make_params()
    with Checkpoints(tmp_path / "checkpoints", keep_latest=3, keep_best=1) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            meta = {"config": {"model": {"cutoffs": (1, 2)}}}
            checkpoints.save(step, {"w": params["embed"]["w"] + step}, {}, {"position": step}, meta, {"loss": loss})
    return tmp_path


TEMPLATE = {"w": jax.ShapeDtypeStruct((30, 40), jnp.float32)}


def reopen(workdir, **options):
    return Checkpoints(workdir / "checkpoints", **{"keep_latest": 3, "keep_best": 1, **options})


def files_of(step_folder):
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def test_round_trip_is_bit_identical(tmp_path):
    params = make_params()
    rest = make_rest(params)
    with Checkpoints(tmp_path / "c", keep_latest=1, keep_best=0) as checkpoints:
        assert checkpoints.restore_latest(abstract(params), abstract(rest)) is None
        assert checkpoints.save(5, params, rest, {"position": 9}, {"config": {"a": [1, 2.5]}}, {"loss": float("nan")})
        restored = checkpoints.restore_latest(abstract(params), abstract(rest))
    assert_same(restored.params, params)
    assert_same(restored.rest, rest)
    assert (restored.step, restored.data, restored.meta["config"], restored.ema) == (5, {"position": 9}, {"a": [1, 2.5]}, None)


def test_arrays_may_be_donated_right_after_save(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep_latest=5, keep_best=0) as checkpoints:
        host = np.arange(300_000, dtype=np.float32)
        for step in range(3):
            value = np.arange(300_000, dtype=np.float32) + step
            x, host[:] = jnp.array(value), value
            checkpoints.save(step, {"w": x, "host": host}, {}, None, {})
            overwrite(x).block_until_ready()
            host[:] = -1
        for step in range(3):
            restored = checkpoints.restore(step, {"w": jax.ShapeDtypeStruct((300_000,), jnp.float32), "host": host}).params
            np.testing.assert_array_equal(restored["w"], np.arange(300_000) + step)
            np.testing.assert_array_equal(restored["host"], np.arange(300_000) + step)


def test_keeps_the_latest_and_the_best(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: None, 5: 2.0, 6: 4.0, 7: 3.0}
    options = dict(keep_latest=2, keep_best=2)
    for steps in ((1, 2, 3, 4), (5, 6, 7)):
        with Checkpoints(tmp_path / "c", **options) as checkpoints:
            for step in steps:
                metrics = None if losses[step] is None else {"loss": losses[step]}
                checkpoints.save(step, {"w": jnp.ones(3)}, {}, None, {}, metrics)
    checkpoints = Checkpoints(tmp_path / "c", **options, read_only=True)
    assert checkpoints.steps() == [2, 5, 6, 7]
    assert checkpoints.best_step() == 2


def test_without_metrics_the_newest_is_best(tmp_path):
    with Checkpoints(tmp_path / "c", keep_latest=2, keep_best=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.full(3, step)}, {}, None, {})
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.restore_best({"w": jnp.zeros(3, int)}).step == 3


def test_saving_a_step_twice_changes_nothing(saved):
    with reopen(saved) as checkpoints:
        assert not checkpoints.save(3, {"w": jnp.zeros((30, 40))}, {}, None, {})
        assert float(checkpoints.restore(3, TEMPLATE).params["w"][0, 0]) != 0.0


def damage(folder, how):
    if how == "empty":
        for path in files_of(folder):
            path.unlink()
    elif how == "truncated":
        for path in files_of(folder / "params"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "flipped":
        path = max(files_of(folder / "params"), key=lambda path: path.stat().st_size)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif how == "meta":
        path = folder / "meta" / "metadata"
        path.write_text(path.read_text().replace('"config"', '"konfig"'))
    elif how == "item":
        shutil.rmtree(folder / "params")
    elif how == "swapped":
        shutil.rmtree(folder / "params")
        shutil.copytree(folder.with_name("2") / "params", folder / "params")


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "meta", "item", "swapped"])
def test_a_damaged_checkpoint_is_named_and_the_next_older_used(saved, how, caplog):
    damage(saved / "checkpoints" / "3", how)
    with reopen(saved) as checkpoints:
        assert checkpoints.restore_latest(TEMPLATE, {}).step == 2
        lines = [record.getMessage() for record in caplog.records if record.name == "deq_flax"]
        assert len(lines) == 1 and "checkpoints/3 is damaged" in lines[0] and "\n" not in lines[0]
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.save(3, {"w": jnp.zeros((30, 40))}, {}, None, {})
        assert checkpoints.restore_latest(TEMPLATE, {}).step == 3


def test_every_file_of_a_checkpoint_is_checked(saved):
    """A flipped byte anywhere either does no harm or is noticed."""
    folder = saved / "checkpoints" / "3"
    good = np.asarray(reopen(saved).restore(3, TEMPLATE).params["w"])
    for path in files_of(folder):
        raw = path.read_bytes()
        for place in {0, len(raw) // 2, len(raw) - 1} if raw else ():
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
            restored = reopen(saved, read_only=True).restore_latest(TEMPLATE, {})
            assert restored.step == 2 or np.array_equal(restored.params["w"], good)
        path.write_bytes(raw)


def test_read_only_touches_nothing(saved):
    damage(saved / "checkpoints" / "3", "empty")
    before = sorted(saved.rglob("*"))
    checkpoints = reopen(saved, read_only=True)
    assert checkpoints.restore_latest(TEMPLATE, {}).step == 2
    with pytest.raises(UserError, match="read-only"):
        checkpoints.save(4, {}, {}, None, {})
    assert sorted(saved.rglob("*")) == before


def test_no_whole_checkpoint_is_an_error_and_never_a_fresh_start(saved):
    for step in "123":
        damage(saved / "checkpoints" / step, "truncated")
    with pytest.raises(UserError, match="all 3 are damaged"):
        reopen(saved).restore_latest(TEMPLATE, {})
    assert reopen(saved).steps() == [1, 2, 3]


def test_an_interrupted_write_is_not_a_checkpoint(saved):
    (saved / "checkpoints" / "3").rename(saved / "checkpoints" / "3.orbax-checkpoint-tmp")
    with reopen(saved) as checkpoints:
        assert checkpoints.restore_latest(TEMPLATE, {}).step == 2
        assert checkpoints.save(3, {"w": jnp.zeros((30, 40))}, {}, None, {})
    assert reopen(saved).steps() == [1, 2, 3]


def test_a_misfit_names_what_differs(saved):
    template = {"w": jax.ShapeDtypeStruct((30, 41), jnp.float32), "b": jnp.zeros(2)}
    with pytest.raises(UserError) as caught:
        reopen(saved).restore_latest(template, {})
    assert "w: file has float32[30, 40], this run needs float32[30, 41]" in str(caught.value)
    assert "b: file has nothing, this run needs float32[2]" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"\(rest\): extra"):
        reopen(saved).restore(3, TEMPLATE, {"extra": jnp.zeros(2)})


def test_load_params_takes_a_workdir_a_folder_or_one_step(saved):
    best = [load_params(saved, TEMPLATE), load_params(saved / "checkpoints", TEMPLATE)]
    assert [restored.step for restored in best] == [2, 2]
    (saved / "checkpoints" / "3").rename(saved / "released")
    assert load_params(saved / "released", TEMPLATE).step == 3
    assert load_params(saved / "released", TEMPLATE).weights["w"].shape == (30, 40)
    assert load_meta(saved)["config"] == {"model": {"cutoffs": [1, 2]}}
    damage(saved / "checkpoints" / "2", "truncated")
    assert load_params(saved, TEMPLATE).step == 1


def test_the_average_is_what_load_params_gives(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1, keep_best=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3)}, {}, None, {}, ema={"w": jnp.ones(3)})
        assert checkpoints.restore_best({"w": jnp.zeros(3)}).weights["w"][0] == 1.0
    restored = load_params(tmp_path, {"w": jnp.zeros(3)})
    assert (restored.params["w"][0], restored.weights["w"][0]) == (0.0, 1.0)


def test_missing_checkpoints_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(UserError, match="no checkpoint at"):
            load_params(path, TEMPLATE)
        with pytest.raises(UserError, match="no checkpoint at"):
            load_meta(path)
    with pytest.raises(UserError, match="there is no such folder"):
        Checkpoints(tmp_path / "nowhere", keep_latest=1, keep_best=1, read_only=True)
    with pytest.raises(UserError, match="no checkpoint of step 8"):
        Checkpoints(tmp_path / "empty", keep_latest=1, keep_best=1).restore(8, TEMPLATE)


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write checkpoints to"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep_latest=1, keep_best=1)
    with pytest.raises(UserError, match="keep_latest"):
        Checkpoints(tmp_path, keep_latest=0, keep_best=1)


def test_a_refused_write_is_one_line_and_keeps_the_older_checkpoint(saved):
    old_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = reopen(saved, keep_latest=1, keep_best=0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(UserError, match=r"cannot write a checkpoint to .*File too large"):
            checkpoints.save(4, {"w": jax.random.normal(jax.random.key(0), (500, 500))}, {}, None, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_signal)
    checkpoints.close()
    assert reopen(saved).restore_latest(TEMPLATE, {}).step == 3


def test_restores_into_the_shardings_of_the_template(saved):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec("data"))
    template = {"w": jax.ShapeDtypeStruct((30, 40), jnp.float32, sharding=sharding)}
    restored = reopen(saved).restore(3, template).params["w"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, reopen(saved).restore(3, TEMPLATE).params["w"])


def test_typed_keys_are_refused(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1, keep_best=1) as checkpoints, pytest.raises(TypeError, match="key_data"):
        checkpoints.save(1, {"key": jax.random.key(0)}, {}, None, {})
