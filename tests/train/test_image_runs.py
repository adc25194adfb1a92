"""Laws of runs on images: exact resumption, running statistics, pictures, and a start from another task's model."""

import json
import zlib

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from deq_flax.checkpoints.loading import load_params, load_params_except_head
from deq_flax.checkpoints.stored_step import named_leaves
from deq_flax.errors import UserError
from deq_flax.train.step import split_model
from tests.tasks.images import classification, segmentation, write_labeled, write_scenes
from tests.train.small import ChangedBatches, arrays, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_labeled(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The workdir and the result of an uninterrupted run of six steps."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(classification(images), workdir)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_the_uninterrupted_one(images, whole, tmp_path):
    """Order, crops, dropout, running statistics: nothing depends on where a run was interrupted."""

    def interrupt(number, batch):
        if number == 5:
            raise KeyboardInterrupt
        return batch

    with pytest.raises(KeyboardInterrupt):
        run(classification(images), tmp_path / "cut", wrap=lambda task: ChangedBatches(task, interrupt))
    resumed = run(classification(images), tmp_path / "cut")
    assert resumed.metrics == whole[1].metrics
    assert arrays(tmp_path / "cut", 6) == arrays(whole[0], 6)
    assert any(name.startswith("variables/") for name in arrays(whole[0], 6)["rest"])


def test_lines_hold_the_documented_metrics(whole):
    train = [line for line in lines(whole[0]) if line["split"] == "train"]
    for name in ("loss", "accuracy", "forward_nfe", "forward_residual", "grad_norm", "steps_per_second", "examples_per_second"):
        assert name in train[-1], name
    valid = [line for line in lines(whole[0]) if line["split"] == "valid"]
    assert [line["step"] for line in valid] == [3, 6] and {"loss", "accuracy"} <= valid[0].keys()
    assert "confusion" not in valid[0]


def test_pictures_are_written_at_every_evaluation(whole):
    pictures = sorted((whole[0] / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["predictions-0000003.png", "predictions-0000006.png"]
    assert np.asarray(Image.open(pictures[0])).shape[2] == 3
    events = b"".join(file.read_bytes() for file in (whole[0] / "tensorboard").iterdir())
    assert events.count(b"\x89PNG") == 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def test_segmentation_starts_from_a_classifier(whole, scenes, tmp_path, capsys):
    """The body is loaded bit for bit, running statistics too, and the head is new; a line is printed for each."""
    options = {"train": {"steps": 1, "eval_every": 0}, "optimizer": {"learning_rate": 1e-12}, "data": {"pictures": 0}}
    config = segmentation(scenes, **options, checkpoint={"init_from": str(whole[0])}, deq={"pretrain_steps": 0})
    kept = {}

    def wrap(task):
        kept["task"] = task
        return task

    result = run(config, tmp_path / "run", wrap)
    out = capsys.readouterr().out
    best = whole[1].step
    _, params, variables = split_model(kept["task"].build_model(nnx.Rngs(0)))
    expected = load_params_except_head(whole[0], params, variables, "head")
    assert f"loaded: {len(expected.loaded)} arrays" in out and "fresh: " in out and "head/last" in out and "unused: " in out
    assert all(name.startswith(("head/", "variables/head/")) for name in expected.fresh + expected.unused)
    source, trained = arrays(whole[0], best), named_leaves(load_params(tmp_path / "run", params).params)
    body = [name for name in trained if not name.startswith("head/")]
    assert result.step == 1 and body
    for name in body:  # one step with a learning rate of 1e-12 leaves them where they started
        np.testing.assert_allclose(trained[name], named_leaves(expected.params)[name], rtol=0, atol=1e-9)
    for name, leaf in named_leaves(expected.params).items():
        if not name.startswith("head/"):
            assert crc(leaf) == source["params"][name]["crc32"]
    for name, leaf in named_leaves(expected.variables).items():
        if not name.startswith("head/"):
            assert crc(leaf) == source["rest"][f"variables/{name}"]["crc32"]


def crc(leaf):
    return zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).tobytes())


def test_another_body_is_refused(whole, scenes, tmp_path):
    config = segmentation(scenes, model={"channels": (6,)}, checkpoint={"init_from": str(whole[0])})
    with pytest.raises(UserError, match="does not fit this config"):
        run(config, tmp_path / "run")
