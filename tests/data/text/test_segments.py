"""Segments are contiguous streams, and evaluation scores every token once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deq_flax.data.loading import iterate, repeat_batches
from deq_flax.data.text.segments import EvalSegments, TrainSegments
from deq_flax.errors import UserError

SIZES = {"n_tokens": st.integers(2, 60), "batch_size": st.integers(1, 7), "seq_len": st.integers(1, 9)}


@settings(deadline=None, derandomize=True)
@given(**SIZES)
def test_evaluation_scores_every_target_once(n_tokens, batch_size, seq_len):
    tokens = np.arange(100, 100 + n_tokens, dtype=np.int32)
    batches = list(EvalSegments(tokens, batch_size, seq_len))
    inputs, targets, mask = (np.concatenate([b[key] for b in batches], axis=1) for key in ("inputs", "targets", "mask"))
    scored = mask == 1
    np.testing.assert_array_equal(targets[scored], tokens[1:])  # row after row: in the order of the text
    np.testing.assert_array_equal(inputs[scored], tokens[:-1])
    assert not targets[~scored].any() and not inputs[~scored].any() and not mask[~scored].any()
    assert all(batch["inputs"].shape == (batch_size, seq_len) for batch in batches)


@settings(deadline=None, derandomize=True)
@given(**SIZES)
def test_training_streams_are_contiguous(n_tokens, batch_size, seq_len):
    tokens = np.arange(n_tokens, dtype=np.int64)
    stream = (n_tokens - 1) // batch_size
    if stream < seq_len:
        with pytest.raises(UserError, match=r"lower data\.batch_size or data\.seq_len"):
            TrainSegments(tokens, batch_size, seq_len)
        return
    batches = list(TrainSegments(tokens, batch_size, seq_len))
    assert len(batches) == stream // seq_len
    used = len(batches) * seq_len
    inputs = np.concatenate([batch["inputs"] for batch in batches], axis=1)
    np.testing.assert_array_equal(inputs, np.arange(batch_size)[:, None] * stream + np.arange(used))
    for batch in batches:
        np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
        assert batch["mask"].all()


@pytest.mark.parametrize("kind", [TrainSegments, EvalSegments])
def test_only_the_first_segment_is_fresh(kind):
    segments = kind(np.arange(50, dtype=np.int32), 3, 4)
    assert [batch["fresh"].tolist() for batch in segments] == [[index == 0] * 3 for index in range(len(segments))]
    types = {key: value.dtype for key, value in segments[0].items()}
    assert types == {"inputs": np.int32, "targets": np.int32, "mask": np.float32, "fresh": np.bool_}


def test_an_epoch_repeats_from_its_start():
    source = TrainSegments(np.arange(50, dtype=np.int32), 3, 4)
    dataset = repeat_batches(source)
    for step in (0, 1, 3, 4, 9):
        np.testing.assert_array_equal(dataset[step]["inputs"], source[step % len(source)]["inputs"])
    assert dataset[len(source)]["fresh"].all()


def test_iteration_resumes_at_any_index():
    dataset = repeat_batches(TrainSegments(np.arange(50, dtype=np.int32), 3, 4))
    for start in (0, 3, 6, 100):
        batches = iterate(dataset, start)
        for step in range(start, start + 6):
            np.testing.assert_array_equal(next(batches)["inputs"], dataset[step]["inputs"])


def test_bad_sizes_give_a_clear_error():
    tokens = np.arange(10, dtype=np.int32)
    for kind in (TrainSegments, EvalSegments):
        for sizes in ((0, 1), (1, 0)):
            with pytest.raises(UserError, match="at least 1"):
                kind(tokens, *sizes)
        with pytest.raises(UserError, match="at least two"):
            kind(tokens[:1], 1, 1)
        with pytest.raises(IndexError):
            kind(tokens, 1, 3)[3]
    with pytest.raises(UserError, match="need at least 13"):
        TrainSegments(tokens, 3, 4)
