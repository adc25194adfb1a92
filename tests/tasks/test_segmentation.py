"""The segmentation task: intersections, unions, hard pixels, and inference at several scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.errors import UserError
from deq_flax.tasks.images import confusion
from deq_flax.tasks.multiscale_inference import MultiscaleInference, starts
from deq_flax.tasks.pixel_loss import PixelLoss
from deq_flax.tasks.segmentation import intersection_over_union
from deq_flax.train.evaluate import measure
from tests.tasks.images import segmentation, write_scenes
from tests.train.small import evaluation_of, make_task, solve_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def task(folder):
    return make_task(segmentation(folder, loss={"class_weights": (1.0, 2.0, 0.5)}))


def test_every_pixel_is_scored_once(folder, task):
    """Confusion and weighted loss over a split in padded batches are those of each image alone."""
    model = task.build_model(nnx.Rngs(0))
    settings = segmentation(folder)
    metrics = measure(*evaluation_of(settings, task, model), "valid")
    batch = task.images.valid.read(np.arange(3), None)
    solve = solve_of(settings)
    predicted = np.asarray(jax.jit(lambda batch: task.picture_arrays(model, batch, solve=solve))(batch))
    table = np.zeros((3, 3))
    for truth, guess in zip(batch["labels"].ravel(), predicted.ravel(), strict=True):
        if truth != 255:
            table[truth, guess] += 1
    np.testing.assert_allclose(metrics["confusion"] * 2, table, rtol=1e-6)  # the mean over two batches
    assert table.sum() == 3 * 7 * 12
    summary = task.summary("valid", metrics)
    ious = [np.sum((batch["labels"] == k) & (predicted == k)) for k in range(3)]
    unions = [np.sum((batch["labels"] != 255) & ((batch["labels"] == k) | (predicted == k))) for k in range(3)]
    np.testing.assert_allclose([summary[f"iou/{k}"] for k in range(3)], np.divide(ious, unions), rtol=1e-5)
    np.testing.assert_allclose(summary["miou"], np.mean(np.divide(ious, unions)), rtol=1e-5)
    assert list(summary)[:3] == ["loss", "miou", "accuracy"]


def test_a_class_that_never_occurs_is_not_averaged():
    iou = intersection_over_union(np.array([[4, 0, 0], [2, 2, 0], [0, 0, 0]]))
    np.testing.assert_allclose(iou, [4 / 6, 2 / 4, np.nan])


def test_confusion_counts_pairs():
    random = np.random.default_rng(0)
    truth, guess, weight = random.integers(0, 4, (3, 50)), random.integers(0, 4, (3, 50)), random.integers(0, 2, (3, 50))
    table = confusion(jnp.asarray(truth), jnp.asarray(guess), jnp.asarray(weight, jnp.float32), 4)
    wanted = [[np.sum(weight * (truth == i) * (guess == j)) for j in range(4)] for i in range(4)]
    np.testing.assert_array_equal(table, wanted)


def test_hard_pixels_are_those_below_the_threshold_or_the_hardest():
    probability = np.array([[[0.1, 0.95, 0.5, 0.99, 0.05, 0.92]]])
    counts = np.array([[[1, 1, 1, 1, 0, 1]]], bool)
    nll = jnp.asarray(-np.log(probability))

    def kept(threshold, pixels):
        loss = PixelLoss(class_weights=(), hard_threshold=threshold, hard_pixels=pixels)
        return np.asarray(loss.keep(nll, jnp.asarray(counts)))[0, 0].astype(int).tolist()

    assert kept(0.0, 1) == [1, 1, 1, 1, 0, 1]
    assert kept(0.9, 1) == [1, 0, 1, 0, 0, 0]
    assert kept(0.9, 3) == [1, 0, 1, 0, 0, 1]
    assert kept(0.9, 100) == [1, 1, 1, 1, 0, 1]


def test_class_weights_are_looked_up_by_label():
    loss = PixelLoss(class_weights=(1.0, 2.0, 0.5), hard_threshold=0.0, hard_pixels=1)
    np.testing.assert_array_equal(loss.weights(jnp.array([[2, 0, 1]])), [[0.5, 1.0, 2.0]])


def local(x):
    """A network without context: the logits of a pixel depend on that pixel alone."""
    return jnp.concatenate([x[..., :1], -x[..., 1:2], 0.5 * x[..., 2:]], axis=-1), jnp.zeros(())


IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 14, 3)).astype(np.float32))


@pytest.mark.parametrize(("flip", "window"), [(True, (0, 0)), (False, (4, 5)), (True, (9, 6))])
def test_windows_and_mirrors_do_not_change_a_network_without_context(flip, window):
    def log_p(**options):
        return MultiscaleInference(scales=(1.0,), size=(9, 14), **options).predict(local, IMAGE)[0]

    np.testing.assert_allclose(log_p(flip=flip, window=window), log_p(flip=False, window=(0, 0)), atol=1e-5)


def test_mirroring_makes_prediction_symmetric():
    def lopsided(x):
        return jnp.concatenate([x[..., :1], jnp.cumsum(x[..., 1:2], axis=2)], axis=-1), jnp.zeros(())

    views = MultiscaleInference(scales=(1.0,), flip=True, window=(0, 0), size=(9, 14))
    a, b = views.predict(lopsided, IMAGE)[0], views.predict(lopsided, IMAGE[:, :, ::-1])[0]
    np.testing.assert_allclose(a, b[:, :, ::-1], atol=1e-5)


def test_scales_are_averaged_as_probabilities():
    def by_size(x):
        return jnp.broadcast_to(jnp.array([x.shape[1] / 9.0, 0.0]), (*x.shape[:3], 2)), jnp.zeros(())

    views = MultiscaleInference(scales=(1.0, 2.0), flip=False, window=(0, 0), size=(9, 14))
    p = np.exp(views.predict(by_size, IMAGE)[0])
    sigmoid = 1 / (1 + np.exp(-np.array([1.0, 2.0])))
    np.testing.assert_allclose(p[..., 0], np.full(p.shape[:3], sigmoid.mean()), rtol=1e-5)


@pytest.mark.parametrize(("length", "window"), [(9, 4), (14, 14), (100, 33), (5, 1)])
def test_windows_cover_everything(length, window):
    seen = np.zeros(length, int)
    for start in starts(length, window):
        assert 0 <= start <= length - window
        seen[start : start + window] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_classes": 0}}, "num_classes at least 1"),
        ({"loss": {"class_weights": (1.0,)}}, "1 numbers for 3 classes"),
        ({"loss": {"hard_threshold": 2.0}}, "hard_threshold"),
        ({"data": {"eval_window": (9, 9)}}, "eval_window"),
        ({"data": {"eval_scales": ()}}, "eval_scales"),
        ({"data": {"crop_size": (0, 4)}}, "crop_size"),
    ],
)
def test_options_that_do_not_fit_are_one_line(folder, changes, message):
    with pytest.raises(UserError) as error:
        make_task(segmentation(folder, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)
