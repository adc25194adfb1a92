"""Laws of loading: a path means one checkpoint, its weights are those to evaluate, and only a head may differ."""

import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax.checkpoints.loading import load_meta, load_params, load_params_except_head
from deq_flax.errors import UserError
from tests.checkpoints.saving import TEMPLATE, damage, opened, save, save_three


def test_load_params_takes_a_workdir_a_folder_or_one_step(tmp_path):
    save_three(tmp_path)
    best = [load_params(tmp_path, TEMPLATE), load_params(tmp_path / "checkpoints", TEMPLATE)]
    assert [restored.step for restored in best] == [2, 2]
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "released")
    assert load_params(tmp_path / "released", TEMPLATE).step == 3
    assert load_params(tmp_path / "released", TEMPLATE).eval_params["w"].shape == (30, 40)
    assert load_meta(tmp_path)["config"] == {"model": {"cutoffs": [1, 2]}}
    damage(tmp_path / "checkpoints" / "2", "truncated")
    assert load_params(tmp_path, TEMPLATE).step == 1


def test_the_moving_average_is_what_is_evaluated(tmp_path):
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 1, {"w": jnp.zeros(3)}, ema={"w": jnp.ones(3)})
        assert checkpoints.restore_best(params={"w": jnp.zeros(3)}).eval_params["w"][0] == 1.0
    restored = load_params(tmp_path, {"w": jnp.zeros(3)})
    assert (restored.params["w"][0], restored.eval_params["w"][0]) == (0.0, 1.0)


def test_only_the_variables_are_read_from_the_rest(tmp_path):
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 1, {"w": jnp.zeros(3)}, rest={"opt_state": jnp.zeros(9), "variables": {"mean_C": jnp.ones(2)}})
    restored = load_params(tmp_path, {"w": jnp.zeros(3)}, {"mean_C": jnp.zeros(2)})
    assert restored.rest is None
    np.testing.assert_array_equal(restored.variables["mean_C"], 1.0)


def test_missing_checkpoints_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(UserError, match="no checkpoint at"):
            load_params(path, TEMPLATE)
        with pytest.raises(UserError, match="no checkpoint at"):
            load_meta(path)


@pytest.fixture(params=[False, True], ids=["params", "ema"])
def trained(request, tmp_path):
    """A checkpoint with a head of its own, whose weights to evaluate are ones: its parameters, or their moving average."""
    ones = {"body": {"w": jnp.ones(3)}, "head": {"bias": jnp.ones(2), "out": jnp.ones((2, 4)), "old": jnp.ones(1)}}
    zeros = {"body": {"w": jnp.zeros(3)}, "head": {"bias": jnp.zeros(2), "out": jnp.zeros((2, 4)), "old": jnp.zeros(1)}}
    with opened(tmp_path) as checkpoints:
        items = {"params": zeros, "ema": ones} if request.param else {"params": ones}
        save(checkpoints, 1, **items, rest={"opt_state": jnp.zeros(9), "variables": {"body": {"mean": jnp.ones(2)}}})
    return tmp_path


def test_another_head_keeps_its_initial_values_where_it_differs(trained):
    params = {"body": {"w": jnp.zeros(3)}, "head": {"bias": jnp.zeros(2), "out": jnp.zeros((2, 7)), "new": jnp.zeros(1)}}
    variables = {"body": {"mean": jnp.zeros(2)}, "head": {"mean": jnp.zeros(5)}}
    loaded = load_params_except_head(trained, params, variables, "head")
    assert loaded.loaded == ["body/w", "head/bias", "variables/body/mean"]
    assert loaded.fresh == ["head/new", "head/out", "variables/head/mean"]
    assert loaded.unused == ["head/old", "head/out"]
    for ones in (loaded.params["body"]["w"], loaded.params["head"]["bias"], loaded.variables["body"]["mean"]):
        np.testing.assert_array_equal(ones, 1.0)
    for zeros in (loaded.params["head"]["out"], loaded.params["head"]["new"], loaded.variables["head"]["mean"]):
        np.testing.assert_array_equal(zeros, 0.0)


def test_another_body_is_refused(trained):
    with pytest.raises(UserError, match=r"body/w: file has float32\[3\], this run needs float32\[4\]"):
        load_params_except_head(trained, {"body": {"w": jnp.zeros(4)}}, {"body": {"mean": jnp.zeros(2)}}, "head")
