"""Batches by number: every epoch has each example once at most, evaluation exactly once, and a number decides all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deq_flax.data.images.labeled import ArrayExamples
from deq_flax.data.loading import EvalBatches, TrainBatches
from deq_flax.data.text.segments import iterate, segment_dataset
from deq_flax.errors import UserError


def examples(count, augment="none", side=4):
    """Image i is i everywhere, its label i."""
    images = np.broadcast_to(np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None], (count, side, side, 1))
    return ArrayExamples(images_NHWC=images, labels_N=np.arange(1, count + 1), augment=augment, pad=1)


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_an_epoch_has_every_example_once_at_most(count, batch_size, seed):
    if count < batch_size:
        with pytest.raises(UserError, match=r"lower data\.batch_size"):
            TrainBatches(examples(count), batch_size, seed)
        return
    batches = TrainBatches(examples(count), batch_size, seed)
    n = batches.batches_per_epoch
    assert n == count // batch_size
    for epoch in (0, 1, 5):
        labels = np.concatenate([batches[epoch * n + i]["labels"] for i in range(n)])
        assert len(labels) == n * batch_size == len(set(labels))


def test_epochs_differ_in_their_order():
    batches = TrainBatches(examples(30), 30, 0)
    orders = {tuple(batches[epoch]["labels"]) for epoch in range(5)}
    assert len(orders) == 5


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_evaluation_scores_every_example_once(count, batch_size):
    batches = EvalBatches(examples(count), batch_size)
    labels, mask = (
        np.concatenate([batch[key] for batch in (batches[i] for i in range(len(batches)))]) for key in ("labels", "mask")
    )
    np.testing.assert_array_equal(labels[mask == 1], np.arange(1, count + 1))
    assert len(mask) == len(batches) * batch_size and set(mask) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "make",
    [lambda rows: TrainBatches(examples(20, "crop_flip"), 6, 1, rows), lambda rows: EvalBatches(examples(8), 6, rows)],
)
def test_processes_that_read_some_rows_each_read_the_batch_together(make):
    for number in range(2):
        whole, parts = make(None)[number], [make(rows)[number] for rows in (slice(0, 2), slice(2, 6))]
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize("start", [0, 3, 7, 50])
def test_training_resumes_at_any_number(start):
    def fresh():
        return TrainBatches(examples(20, "crop_flip"), 6, 1)

    resumed, whole = iterate(segment_dataset(fresh()), start), fresh()
    for number in range(start, start + 5):
        batch, wanted = next(resumed), whole[number]
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])


def test_the_seed_and_the_epoch_decide_augmentation():
    def images(seed, number):
        return TrainBatches(examples(6, "crop"), 6, seed)[number]["images"].tobytes()

    assert images(0, 0) == images(0, 0)
    assert len({images(0, 0), images(1, 0), images(0, 1)}) == 3


def test_a_batch_beyond_the_last_is_an_index_error():
    with pytest.raises(IndexError, match="batch 2 of 2"):
        EvalBatches(examples(6), 4)[2]


def test_an_error_while_reading_ahead_reaches_the_caller():
    class Unreadable:
        def __len__(self):
            return 8

        def read(self, indices, random):
            raise UserError("3 images are damaged")

    with pytest.raises(UserError, match="3 images are damaged"):
        next(iterate(segment_dataset(TrainBatches(Unreadable(), 4, 0))))
