"""Texts by name: three streams of token ids and, where the words are known, their vocabulary.

To add a text: a loader function and a line in `TEXTS`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deq_flax.data.loading import SPLITS, Splits, check_least, data_path, readable
from deq_flax.data.text.arrays import map_npy
from deq_flax.data.text.cache import load_or_encode
from deq_flax.data.text.files import Layout, find_texts
from deq_flax.data.text.pydoc import pydoc_corpus
from deq_flax.data.text.tokenizer import TOKENIZER_FILE
from deq_flax.data.text.vocabulary import MAX_BYTES, VOCABULARY_FILE, Vocabulary
from deq_flax.errors import UserError
from deq_flax.untrusted.files import read_json, read_text, shown

CORPUS_FILE = "corpus.json"
"""File beside token arrays: `vocab_size`, and `tokens` and `bytes` by split."""
MAX_IDS = 1 << 24
"""Most ids of a vocabulary whose size only the largest id tells."""
CHUNK = 1 << 22
"""Tokens of a memory-mapped text that are examined at once."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Section `data` of a language model's config."""

    name: str
    """Text: {TEXTS}. ptb and wt103 are read from the published files; tokens are arrays of ids, as deq_flax.tokenize writes
    them; pydoc is English text included in Python."""
    path: str = ""
    """Folder of the text's files; for wt103 also the published zip file. pydoc needs none."""
    cache: str = ""
    """Folder for encoded texts; empty: $XDG_CACHE_HOME/deq_flax or ~/.cache/deq_flax."""
    batch_size: int = 16
    """Parallel streams of text in a training step, over all devices and micro-batches."""
    seq_len: int = 128
    """Tokens of each stream in a training step."""
    eval_batch_size: int = 16
    """Parallel streams of text in evaluation, over all devices."""
    eval_seq_len: int = 128
    """Tokens of each stream in an evaluation step."""

    def __post_init__(self):
        check_least(self, 1, "batch_size", "seq_len", "eval_batch_size", "eval_seq_len")


@dataclass(frozen=True, kw_only=True)
class Corpus(Splits[np.ndarray]):
    """A text as token ids. Each split is (N,) of an integer type, int32 except from `tokens`, possibly memory-mapped."""

    vocab_size: int
    vocabulary: Vocabulary | None = None
    """Words by their ids; None where the tokens are no words, or only ids are known."""
    tokenizer_json: str | None = None
    """Content of the tokenizer.json of subword tokens, if there is one."""
    n_bytes: Mapping[str, int] | None = None
    """Bytes of each split's text, where a file tells; those of words are counted."""

    @property
    def vocabulary_file(self) -> tuple[str, str] | None:
        """Name and content of the file that decodes the tokens, vocabulary.txt or tokenizer.json; None if there is none."""
        if self.tokenizer_json is not None:
            return TOKENIZER_FILE, self.tokenizer_json
        return None if self.vocabulary is None else (VOCABULARY_FILE, self.vocabulary.to_text())

    def bytes_per_token(self, split: str) -> float | None:
        """Mean length of a split's tokens in bytes of UTF-8 text; None if it is not known.

        Words are counted with one separator each, a space or a line break: as `Vocabulary.decode` writes them.
        """
        tokens = self.split(split)
        if self.n_bytes is not None:
            return self.n_bytes[split] / len(tokens)
        if self.vocabulary is None:
            return None
        return sum(map(self.vocabulary.count_bytes, _chunks(tokens))) / len(tokens)

    def unigram_nll(self, split: str) -> float:
        """Nats per token of a split under the training frequencies with add-one smoothing: a baseline for any model.

        All tokens but the first are scored, as in language-model evaluation. Raises UserError for an unknown split.
        """
        counts = _counts(self.train, self.vocab_size)
        log_p = np.log(counts + 1) - np.log(len(self.train) + self.vocab_size)
        targets = _counts(self.split(split)[1:], self.vocab_size)
        return float(-(targets @ log_p) / targets.sum())


def load_text(options: TextOptions, vocab_size: int = 0) -> Corpus:
    """Load the text `options.name`, encoding it into the cache if it is not there yet.

    Args:
        options: section `data` of the config.
        vocab_size: the number of ids that the model has; 0: that of the text. A text with more is refused, and 'tokens',
            which has no vocabulary, takes this one as its own.

    Raises:
        UserError: an unknown name, a file that is missing or cannot be read, a cache that cannot be written, or more ids
            than `vocab_size`.
    """
    if options.name not in TEXTS:
        raise UserError(f"no text {options.name!r}; known: {', '.join(TEXTS)}")
    corpus = TEXTS[options.name](options, vocab_size)
    if vocab_size and corpus.vocab_size > vocab_size:
        raise UserError(
            f"the text {options.name!r} has {corpus.vocab_size} words, the model only {vocab_size}: raise model.vocab_size"
        )
    return corpus


def _load_words(layout: Layout, options: TextOptions, _: int) -> Corpus:
    """Load published files of whitespace-separated words."""
    texts = find_texts(layout, options.path)
    tokens, vocabulary = load_or_encode(
        options.name, texts, lower_case=layout.lower_case, counted=layout.counted, cache=options.cache
    )
    splits: dict[str, Any] = tokens
    return Corpus(**splits, vocab_size=len(vocabulary), vocabulary=vocabulary)


def _load_pydoc(options: TextOptions, _: int) -> Corpus:
    """Encode the documentation in the standard library."""
    texts, vocabulary = pydoc_corpus()
    splits: dict[str, Any] = {split: vocabulary.encode(text) for split, text in texts.items()}
    return Corpus(**splits, vocab_size=len(vocabulary), vocabulary=vocabulary)


def _load_tokens(options: TextOptions, vocab_size: int) -> Corpus:
    """Map {train,valid,test}.npy of token ids."""
    folder = data_path(options.path, _TOKENS_WANTED)
    splits: dict[str, Any] = {split: _map_tokens(folder / f"{split}.npy") for split in SPLITS}
    meta = _corpus_file(folder / CORPUS_FILE, splits)
    tokenizer = folder / TOKENIZER_FILE
    with readable(tokenizer):
        tokenizer_json = read_text(tokenizer, MAX_BYTES, "the tokenizer") if meta and tokenizer.exists() else None
    vocab_size = vocab_size or meta.get("vocab_size", 0)
    limit = vocab_size or MAX_IDS
    largest = 0
    for split, tokens in splits.items():
        file = folder / f"{split}.npy"
        for chunk in _chunks(tokens):
            if chunk.min() < 0:
                raise UserError(f"{file} holds the negative id {chunk.min()}: token ids count from 0")
            largest = max(largest, int(chunk.max()))
            if largest >= limit:
                raise UserError(f"{file} holds the id {largest}, the ids must be below {limit}: see model.vocab_size")
    return Corpus(
        **splits,
        vocab_size=vocab_size or largest + 1,
        tokenizer_json=tokenizer_json,
        n_bytes=meta.get("bytes"),
    )


def _corpus_file(file: Path, splits: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Read what `deq_flax.tokenize` wrote beside its arrays; empty if there is none."""
    if not file.exists():
        return {}
    try:
        meta = read_json(file)
        numbers = [meta["vocab_size"], *(meta[key][split] for key in ("tokens", "bytes") for split in SPLITS)]
        whole = all(type(n) is int and n > 0 for n in numbers)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{file} is damaged: encode the text again with deq_flax.tokenize, or delete it to use the ids alone")
    for split, tokens in splits.items():
        if len(tokens) != meta["tokens"][split]:
            raise UserError(
                f"{file} is of {split}.npy of {meta['tokens'][split]} tokens, which has {len(tokens)}: encode the text again, "
                "or delete it to use the ids alone"
            )
    return meta


_TOKENS_WANTED = (
    "set data.path to the folder of train.npy, valid.npy and test.npy, 1-D integer token ids (deq_flax.tokenize writes them)"
)
_PTB = Layout(
    patterns=("ptb.{}.txt", "{}.txt"),
    lower_case=True,
    counted=SPLITS,
    published="the Penn Treebank of Mikolov's simple-examples, in its folder data (the treebank itself is LDC99T42)",
)
_WT103 = Layout(
    patterns=("wiki.{}.tokens", "{}.txt"),
    lower_case=False,
    counted=("train",),
    published="wikitext-103-v1.zip of Salesforce Research, 'The WikiText long term dependency language modeling dataset'",
    zip_name="wikitext-103-v1.zip",
)

TEXTS: dict[str, Callable[[TextOptions, int], Corpus]] = {
    "ptb": partial(_load_words, _PTB),
    "wt103": partial(_load_words, _WT103),
    "tokens": _load_tokens,
    "pydoc": _load_pydoc,
}
"""Loaders by `data.name`: (options, vocabulary size of the model or 0) -> corpus."""


def _map_tokens(file: Path) -> np.ndarray:
    try:
        tokens = map_npy(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist: {_TOKENS_WANTED}") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged or no .npy file ({error})") from error
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{file} holds {shown(str(tokens.dtype))} {tokens.shape}: it must be one 1-D array of integers")
    if not len(tokens):
        raise UserError(f"{file} is empty")
    return tokens


def _chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    return (tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK))


def _counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count each id, (vocab_size,), without copying the whole text."""
    counts = np.zeros(vocab_size, np.int64)
    for chunk in _chunks(tokens):
        counts += np.bincount(chunk.astype(np.int64, copy=False), minlength=vocab_size)
    return counts
