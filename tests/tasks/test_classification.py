"""The classification task: every image counts once, in every metric."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from deq_flax.errors import UserError
from deq_flax.train.evaluate import evaluate, measure
from tests.tasks.images import classification, write_labeled
from tests.train.small import evaluation_of, make_task, solve_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_labeled(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def task(folder):
    return make_task(classification(folder))


@pytest.fixture(scope="module")
def model(task):
    return task.build_model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def measured(folder, task, model):
    """Divided metrics and summary of the validation split: nine images in batches of four."""
    arguments = (*evaluation_of(classification(folder), task, model), "valid")
    return measure(*arguments), evaluate(*arguments)


def test_every_image_is_scored_once(folder, task, model, measured):
    """The reported numbers are those of all images in one batch, whatever the padding of the last."""
    batch = task.images.valid.read(np.arange(9), None)
    solve = solve_of(classification(folder))
    logits = np.asarray(jax.jit(lambda batch: task.picture_arrays(model, batch, solve=solve))(batch))
    right = np.argmax(logits, axis=1) == batch["labels"]
    nll = -np.log(logits[np.arange(9), batch["labels"]])
    metrics, summary = measured
    np.testing.assert_allclose(summary["accuracy"], right.mean(), rtol=1e-6)
    np.testing.assert_allclose(summary["loss"], nll.mean(), rtol=1e-3)
    table = metrics["confusion"] * 3  # the mean over three batches
    np.testing.assert_allclose(table.sum(axis=1), [3, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(np.trace(table), right.sum(), rtol=1e-6)


def test_slots_change_no_score(folder, task, model, measured):
    """Four images at a time through three slots: the numbers are those of whole batches, up to rounding."""
    summary = evaluate(*evaluation_of(classification(folder), task, model, slots=3), "valid")
    whole = measured[1]
    np.testing.assert_allclose([summary[k] for k in ("loss", "accuracy")], [whole[k] for k in ("loss", "accuracy")], rtol=1e-5)
    np.testing.assert_allclose(summary["forward_residual"], whole["forward_residual"], rtol=1e-3)
    assert summary["forward_nfe"] == 2 * whole["forward_nfe"] == 8  # four images, none of which converges in four evaluations


def test_the_summary_holds_numbers_with_the_loss_first(measured):
    assert list(measured[1])[:2] == ["loss", "accuracy"] and all(isinstance(x, float) for x in measured[1].values())


@pytest.mark.parametrize("rank", range(7))
def test_the_right_class_counts_up_to_its_rank(task, rank):
    """Top 1 and top 5 with the right class at a known rank among seven."""
    logits = np.tile(np.arange(7.0)[::-1], (4, 1)).astype(np.float32)
    output = SimpleNamespace(logits=logits, stats=None, jacobian_loss=None)
    labels = np.array([rank, rank, rank, 6], np.int32)
    batch = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": labels, "mask": np.array([1, 1, 1, 0], np.float32)}
    metrics = task.loss(lambda *_, **__: output, batch, ())[1].metrics
    assert metrics["accuracy"].total == 3 * (rank < 1) and metrics["top5_accuracy"].total == 3 * (rank < 5)
    assert metrics["accuracy"].count == metrics["loss"].count == 3
    np.testing.assert_allclose(metrics["loss"].total / 3, np.log(np.exp(logits[0]).sum()) - logits[0, rank], rtol=1e-6)


def test_masked_images_change_nothing(task, model):
    batch = dict(task.images.valid.read(np.arange(4), None))
    loss = jax.jit(lambda batch: task.loss(model, batch, ())[1].metrics)
    masked = batch | {"mask": np.array([1, 1, 0, 0], np.float32)}
    a, b = loss(masked), loss(masked | {"images": batch["images"][[0, 1, 1, 0]], "labels": batch["labels"][[0, 1, 1, 1]]})
    np.testing.assert_allclose(a["loss"].total, b["loss"].total, rtol=1e-5)
    np.testing.assert_array_equal(a["confusion"].total, b["confusion"].total)
    assert a["loss"].count == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_classes": 4}}, "the data has 3: set it to that"),
        ({"model": {"in_channels": 1}}, "model.in_channels"),
        ({"model": {"head": "segmentation"}}, "model.head"),
        ({"model": {"groups": 3}}, "section model"),
        ({"data": {"mean": (0.5,)}}, "data.mean"),
        ({"data": {"batch_size": 0}}, "data.batch_size"),
        ({"data": {"batch_size": 16}}, "lower data.batch_size"),
        ({"data": {"image_size": 9}}, "data.resize"),
        ({"deq": {"gradient": "none"}}, "deq.gradient"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folder, changes, message):
    with pytest.raises(UserError) as error:
        make_task(classification(folder, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)
