"""Word-level texts by name: each becomes three streams of token ids and, where there are words, their vocabulary."""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deq_flax.data.splits import SPLITS, Splits
from deq_flax.data.text.cache import load_or_encode
from deq_flax.data.text.files import Layout, find_texts
from deq_flax.data.text.pydoc import pydoc_corpus
from deq_flax.data.text.vocabulary import Vocabulary
from deq_flax.errors import UserError

CHUNK = 1 << 22

LAYOUTS = {
    "ptb": Layout(
        patterns=("ptb.{}.txt", "{}.txt"),
        lower_case=True,
        counted=SPLITS,
        published="the Penn Treebank of Mikolov's simple-examples, in its folder data (the treebank itself is LDC99T42)",
    ),
    "wt103": Layout(
        patterns=("wiki.{}.tokens", "{}.txt"),
        lower_case=False,
        counted=("train",),
        published="wikitext-103-v1.zip of Salesforce Research, 'The WikiText long term dependency language modeling dataset'",
        zip_name="wikitext-103-v1.zip",
    ),
}
_TOKENS_WANTED = "set data.path to the folder of train.npy, valid.npy and test.npy, 1-D int32 token ids"
NAMES = (*LAYOUTS, "tokens", "pydoc")


@dataclass(frozen=True, kw_only=True)
class Corpus(Splits[np.ndarray]):
    """A text as token ids. Each split is (N,) of an integer type (int32 unless the ids came ready made), perhaps a memmap."""

    vocab_size: int
    vocabulary: Vocabulary | None = None
    """None where only ids are known."""

    def unigram_nll(self, split: str) -> float:
        """Nats per token of a split under the training frequencies with add-one smoothing: what a model must beat.

        Scored are all tokens but the first, as in language-model evaluation. Raises UserError for an unknown split.
        """
        counts = _counts(self.train, self.vocab_size)
        log_p = np.log(counts + 1) - np.log(len(self.train) + self.vocab_size)
        targets = _counts(self.split(split)[1:], self.vocab_size)
        return float(-(targets @ log_p) / targets.sum())


def load_text(name: str, path: str = "", cache: str = "", *, vocab_size: int = 0) -> Corpus:
    """The text `name`.

    Args:
        name: 'ptb' and 'wt103' read the published files below `path` and encode them once, into a cache; 'tokens' maps
            {train,valid,test}.npy of token ids in the folder `path`; 'pydoc' needs no file: English from the standard library.
        path: the folder with the files; for 'wt103' also wikitext-103-v1.zip itself or the folder with it.
        cache: the folder to hold the caches; '': `$XDG_CACHE_HOME/deq_flax` or `~/.cache/deq_flax`.
        vocab_size: the number of ids a model knows; '0': as many as the text has. A text that has more is refused, and
            'tokens', which has no vocabulary, takes this as its own.

    Raises:
        UserError: an unknown name, a file that is missing or cannot be read, a cache that cannot be written, or more ids
            than `vocab_size`.
    """
    if name in LAYOUTS:
        layout = LAYOUTS[name]
        splits, vocabulary = load_or_encode(
            name, find_texts(layout, path), lower_case=layout.lower_case, counted=layout.counted, cache=cache
        )
    elif name == "tokens":
        return _load_tokens(path, vocab_size)
    elif name == "pydoc":
        texts, vocabulary = pydoc_corpus()
        splits = {split: vocabulary.encode(text) for split, text in texts.items()}
    else:
        raise UserError(f"no text {name!r}; known: {', '.join(NAMES)}")
    if vocab_size and len(vocabulary) > vocab_size:
        raise UserError(f"the text {name!r} has {len(vocabulary)} words, the model only {vocab_size}: raise model.vocab_size")
    return Corpus(**splits, vocab_size=len(vocabulary), vocabulary=vocabulary)


def _load_tokens(path: str, vocab_size: int) -> Corpus:
    if not path:
        raise UserError(f"data.path is not set: {_TOKENS_WANTED}")
    folder = Path(os.path.expanduser(path))
    limit = vocab_size or np.iinfo(np.int32).max
    splits = {split: _map_tokens(folder / f"{split}.npy") for split in SPLITS}
    largest = 0
    for split, tokens in splits.items():
        file = folder / f"{split}.npy"
        for chunk in _chunks(tokens):
            if chunk.min() < 0:
                raise UserError(f"{file} holds the negative id {chunk.min()}: token ids count from 0")
            largest = max(largest, int(chunk.max()))
            if largest >= limit:
                raise UserError(f"{file} holds the id {largest}, the ids must be below {limit}: see model.vocab_size")
    return Corpus(**splits, vocab_size=vocab_size or largest + 1)  # ty: ignore[invalid-argument-type]


def _map_tokens(file: Path) -> np.ndarray:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: {_TOKENS_WANTED}") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged or no .npy file ({' '.join(str(error).split())})") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        found = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise UserError(f"{file} holds {found}: it must be one 1-D array of integers")
    if not len(tokens):
        raise UserError(f"{file} is empty")
    return tokens


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK))


def _counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, (vocab_size,), without a copy of the whole text."""
    counts = np.zeros(vocab_size, np.int64)
    for chunk in _chunks(tokens):
        counts += np.bincount(chunk.astype(np.int64, copy=False), minlength=vocab_size)
    return counts
