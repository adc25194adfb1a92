"""A stream of tokens as whole batches of segments, for models that carry memory from one segment to the next.

The N-1 pairs (token, next token) are cut into B contiguous streams, one for each row of the batch, and the streams into
segments of L pairs. Element i is segment i of every stream, so a run resumes by the number of its step.

Axes: B batch (streams), L positions in a segment.
"""

from collections.abc import Iterator

import grain
import numpy as np

from deq_flax.errors import UserError

READ_AHEAD = 4
"""Batches that `iterate` reads while the current one is used."""


class TrainSegments:
    """Segments of full streams: the incomplete last one, and pairs that do not fill every stream, are left out.

    Element: `inputs` and `targets` (B, L) int32; `mask` (B, L) float32, all one; `fresh` (B,) bool, true where a stream
    starts and memory must be empty.

    Args:
        tokens: (N,) integers, perhaps a memmap.
        batch_size: B.
        seq_len: L.
        rows: of the batch, the only ones to read; None: all.

    Raises:
        UserError: a size below 1, or a text too short for one segment of every stream.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, rows: slice | None = None):
        _check(tokens, batch_size, seq_len)
        self._tokens, self._rows, self._seq_len = tokens, range(batch_size)[rows or slice(None)], seq_len
        self._stream = (len(tokens) - 1) // batch_size
        if self._stream < seq_len:
            raise UserError(
                f"the text has {len(tokens)} tokens; {batch_size} streams of segments of {seq_len} need at least "
                f"{batch_size * seq_len + 1}: lower data.batch_size or data.seq_len"
            )

    def __len__(self) -> int:
        return self._stream // self._seq_len

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _batch(self._tokens, self._rows, self._seq_len, self._stream, _valid_index(index, len(self)))


class EvalSegments:
    """Segments that score every token but the first exactly once: what is missing at the end is padded and masked.

    Element: `inputs` and `targets` (B, L) int32, 0 where padded; `mask` (B, L) float32, 1 where a target counts, 0 where
    it is padding; `fresh` (B,) bool, true where a stream starts and memory must be empty.

    Args:
        tokens: (N,) integers, perhaps a memmap.
        batch_size: B. Rows that find no pair left are all padding.
        seq_len: L.
        rows: of the batch, the only ones to read; None: all.

    Raises:
        UserError: a size below 1, or fewer than two tokens.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, rows: slice | None = None):
        _check(tokens, batch_size, seq_len)
        self._tokens, self._rows, self._seq_len = tokens, range(batch_size)[rows or slice(None)], seq_len
        self._stream = -(-(len(tokens) - 1) // batch_size)

    def __len__(self) -> int:
        return -(-self._stream // self._seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return _batch(self._tokens, self._rows, self._seq_len, self._stream, _valid_index(index, len(self)))


def segment_dataset(source: grain.sources.RandomAccessDataSource) -> grain.MapDataset:
    """The batches of `source` as a Grain dataset. Index i gives batch i modulo its length: epoch after epoch."""
    return grain.MapDataset.source(source)


def iterate(dataset: grain.MapDataset, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start`, `start` + 1, ... to the end of `dataset`, a few read ahead in one background thread.

    Training that never ends is `iterate(dataset.repeat(), step)`; its first batch is `dataset[step]`.
    """
    # One thread: more of them contend for the GIL, and the work is page faults and small copies.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
    return iter(dataset[start:].to_iter_dataset(options))


def _check(tokens: np.ndarray, batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise UserError(f"batch_size and seq_len must be at least 1, got {batch_size} and {seq_len}: see section data")
    if len(tokens) < 2:
        raise UserError(f"the text has {len(tokens)} token(s): at least two are needed to predict one from the other")


def _valid_index(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"segment {index} of {length}")
    return index % length


def _batch(tokens: np.ndarray, streams: range, seq_len: int, stream: int, index: int) -> dict[str, np.ndarray]:
    """Pairs [index * L, (index + 1) * L) of each of `streams`, `stream` pairs long; those past its end or the text's are
    padding."""
    inputs = np.zeros((len(streams), seq_len), np.int32)
    targets = np.zeros((len(streams), seq_len), np.int32)
    mask = np.zeros((len(streams), seq_len), np.float32)
    for i, row in enumerate(streams):
        start = row * stream + index * seq_len
        stop = min(start + seq_len, (row + 1) * stream, len(tokens) - 1)
        if start < stop:
            count = stop - start
            inputs[i, :count] = tokens[start:stop]
            targets[i, :count] = tokens[start + 1 : stop + 1]
            mask[i, :count] = 1
    return {"inputs": inputs, "targets": targets, "mask": mask, "fresh": np.full(len(streams), index == 0)}
