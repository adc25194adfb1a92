"""A stream of tokens as batches of segments, for models that carry memory from one segment to the next.

The N-1 pairs (token, next token) are cut into B contiguous streams, one for each row of the batch, and the streams into
segments of L pairs. Element i is segment i of every stream.

Axes: B batch (streams), L positions in a segment.
"""

import numpy as np

from deq_flax.data.loading import Batch
from deq_flax.errors import UserError


class _Segments:
    """Batches by index. `padded`: keep what does not fill a segment of every stream, padded, instead of omitting it."""

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, rows: slice | None, *, padded: bool):
        if batch_size < 1 or seq_len < 1:
            raise UserError(f"batch_size and seq_len must be at least 1, got {batch_size} and {seq_len}: see section data")
        if len(tokens) < 2:
            raise UserError(f"the text has {len(tokens)} token(s): at least two are needed to predict one from the other")
        self._tokens, self._rows, self._seq_len = tokens, range(batch_size)[rows or slice(None)], seq_len
        pairs = len(tokens) - 1
        self._stream = -(-pairs // batch_size) if padded else pairs // batch_size
        self._length = -(-self._stream // seq_len) if padded else self._stream // seq_len

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"segment {index} of {len(self)}")
        index %= len(self)
        shape = len(self._rows), self._seq_len
        inputs, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for i, row in enumerate(self._rows):
            start = row * self._stream + index * self._seq_len
            stop = min(start + self._seq_len, (row + 1) * self._stream, len(self._tokens) - 1)
            if start < stop:
                count = stop - start
                inputs[i, :count] = self._tokens[start:stop]
                targets[i, :count] = self._tokens[start + 1 : stop + 1]
                mask[i, :count] = 1
        return {"inputs": inputs, "targets": targets, "mask": mask, "fresh": np.full(len(self._rows), index == 0)}


class TrainSegments(_Segments):
    """Segments of full streams, without the incomplete last one and the pairs that do not fill every stream.

    Element: `inputs` and `targets` (B, L) int32; `mask` (B, L) float32, all ones; `fresh` (B,) bool, true where a stream
    starts and memory must be empty.

    Args:
        tokens: (N,) integers, possibly memory-mapped.
        batch_size: B.
        seq_len: L.
        rows: the rows of each batch to read and return; None: all.

    Raises:
        UserError: a size below 1, or a text too short for one segment of every stream.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, rows: slice | None = None):
        super().__init__(tokens, batch_size, seq_len, rows, padded=False)
        if not len(self):
            raise UserError(
                f"the text has {len(tokens)} tokens; {batch_size} streams of segments of {seq_len} need at least "
                f"{batch_size * seq_len + 1}: lower data.batch_size or data.seq_len"
            )


class EvalSegments(_Segments):
    """Segments that contain every token but the first exactly once as a target; the ends are padded and masked.

    Element: `inputs` and `targets` (B, L) int32, 0 where padded; `mask` (B, L) float32, 1 where a target counts, 0 where
    it is padding; `fresh` (B,) bool, true where a stream starts and memory must be empty.

    Args:
        tokens: (N,) integers, possibly memory-mapped.
        batch_size: B. Rows beyond the last pair are all padding.
        seq_len: L.
        rows: the rows of each batch to read and return; None: all.

    Raises:
        UserError: a size below 1, or fewer than two tokens.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, rows: slice | None = None):
        super().__init__(tokens, batch_size, seq_len, rows, padded=True)
