"""Batches by number: an epoch has each example at most once, evaluation exactly once, and the number determines the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deq_flax.data.images.labeled import ArrayExamples
from deq_flax.data.loading import EvalBatches, iterate, train_dataset
from deq_flax.errors import UserError


def examples(count, augment="none", side=4):
    """Images of one gray value, 1 to `count`, which is also the label."""
    images = np.broadcast_to(np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None], (count, side, side, 1))
    return ArrayExamples(images_NHWC=images, labels_N=np.arange(1, count + 1), augment=augment, pad=1)


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_an_epoch_has_every_example_once_at_most(count, batch_size, seed):
    if count < batch_size:
        with pytest.raises(UserError, match=r"lower data\.batch_size"):
            train_dataset(examples(count), batch_size, seed=seed)
        return
    batches = train_dataset(examples(count), batch_size, seed=seed)
    n = count // batch_size
    for epoch in (0, 1, 5):
        labels = np.concatenate([batches[epoch * n + i]["labels"] for i in range(n)])
        assert len(labels) == n * batch_size == len(set(labels))


class Draws:
    """Examples that are their own index, with a random number for each batch."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, indices, random):
        return {"index": np.array(indices), "draw": np.full(len(indices), random.integers(2**62))}


def test_epochs_differ_in_their_order():
    batches = train_dataset(Draws(30), 30, seed=0)
    orders = {tuple(batches[epoch]["index"]) for epoch in range(5)}
    assert len(orders) == 5


def test_orders_are_uncorrelated_within_and_between_epochs():
    count = 60_000
    batches = train_dataset(Draws(count), 1000, seed=0)
    first, second = (np.concatenate([batches[epoch * 60 + i]["index"] for i in range(60)]) for epoch in (0, 1))
    for a, b in ((first[:-1], first[1:]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / count**0.5


def test_every_batch_has_its_own_random_numbers():
    draws = {train_dataset(Draws(20), 6, seed=seed)[step]["draw"][0] for seed in range(3) for step in range(9)}
    assert len(draws) == 27


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
    [
        lambda rows: train_dataset(examples(20, "crop_flip"), 6, seed=1, rows=rows),
        lambda rows: EvalBatches(examples(8), 6, rows),
    ],
)
def test_rows_of_several_processes_make_up_the_batch(make):
    for number in range(2):
        whole, parts = make(None)[number], [make(rows)[number] for rows in (slice(0, 2), slice(2, 6))]
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize("start", [0, 3, 7, 50])
def test_training_resumes_at_any_number(start):
    def fresh():
        return train_dataset(examples(20, "crop_flip"), 6, seed=1)

    resumed, whole = iterate(fresh(), start), fresh()
    for number in range(start, start + 5):
        batch, wanted = next(resumed), whole[number]
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])


def test_the_seed_and_the_epoch_determine_augmentation():
    def images(seed, number):
        batch = train_dataset(examples(6, "crop"), 6, seed=seed)[number]
        return batch["images"][batch["labels"].argsort()].tobytes()  # in the same order in every batch

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
        next(iterate(train_dataset(Unreadable(), 4, seed=0)))
