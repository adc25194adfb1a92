"""Vocabularies: words and their ids, ordered as in Transformer-XL, with which the published checkpoints were trained."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from deq_flax.errors import UserError
from deq_flax.untrusted.files import read_text, shown

VOCABULARY_FILE = "vocabulary.txt"
EOS = "<eos>"
UNK = "<unk>"
MAX_WORDS = 1 << 21
"""Most different words of a text. A million take 150 MB; wikitext-103 has 267,735."""
MAX_BYTES = 1 << 28
"""Largest size of a vocabulary's file in bytes."""


def count_words(pieces: Iterable[str], *, lower_case: bool = False) -> Counter[str]:
    """Count each whitespace-separated word, in the order of first appearance. UserError: more than MAX_WORDS differ."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update((piece.lower() if lower_case else piece).split())
        if len(counts) > MAX_WORDS:
            raise UserError(f"the text has more than {MAX_WORDS} different words: it is no text, or must be tokenized first")
    return counts


class _Ids(dict[str, int]):
    """Ids by word; an unknown word has the id of '<unk>'."""

    def __missing__(self, word: str) -> int:
        unknown = self.get(UNK)
        if unknown is None:
            raise UserError(f"the word {shown(word)!r} is not in the vocabulary, which has no {UNK!r} to stand for it")
        return unknown


class Vocabulary:
    """An ordered set of words; the id of a word is its index.

    Args:
        words: the words in the order of their ids, each once.
        lower_case: convert text to lower case before its words are looked up.

    Raises:
        ValueError: a word occurs twice.
    """

    def __init__(self, words: Iterable[str], *, lower_case: bool = False):
        self.words = tuple(words)
        self.lower_case = lower_case
        self._ids = _Ids((word, index) for index, word in enumerate(self.words))
        if len(self._ids) != len(self.words):
            raise ValueError("a word occurs in the vocabulary twice")

    @classmethod
    def from_counts(cls, counts: Counter[str], *, lower_case: bool = False) -> "Vocabulary":
        """Order words by decreasing count, equal counts by first appearance, after '<eos>'."""
        ranked = (word for word, _ in counts.most_common() if word != EOS)
        return cls((EOS, *ranked), lower_case=lower_case)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def encode(self, text: str) -> np.ndarray:
        """Encode the words of `text` as ids (N,) int32; every line break becomes one '<eos>'.

        A last line without a line break gets no '<eos>', so that a prompt can be continued.

        Raises:
            UserError: a word is unknown and the vocabulary has no '<unk>'.
        """
        text = text.lower() if self.lower_case else text
        words = text.replace("\n", f" {EOS} ").split()
        return np.fromiter(map(self._ids.__getitem__, words), np.int32, count=len(words))

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to words with spaces between them and '<eos>' as a line break: the inverse of `encode` up to spacing.

        Raises:
            IndexError: an id is negative, or too large for the vocabulary.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self.words)):
            raise IndexError(f"ids must be from 0 to {len(self.words) - 1}, got {ids.min()} to {ids.max()}")
        lines = " ".join(self.words[index] for index in ids).split(EOS)
        return "\n".join(line.strip(" ") for line in lines)

    def stream(self, before: Iterable[int]) -> Callable[[int], str]:
        """Return a function from the next id to the text that it adds to that of `before`."""
        at_line_start = ([EOS] + [self.words[i] for i in before])[-1] == EOS

        def text_of(token: int) -> str:
            nonlocal at_line_start
            word = self.words[token]
            text = "\n" if word == EOS else word if at_line_start else f" {word}"
            at_line_start = word == EOS
            return text

        return text_of

    def to_text(self) -> str:
        """Return the content of `vocabulary.txt`, one word a line."""
        return "".join(f"{word}\n" for word in self.words)

    def count_bytes(self, ids: np.ndarray) -> int:
        """Bytes of the text of ids in UTF-8: of each word with the space or line break after it, and of empty lines.

        The text is a part of a longer one: its last word has a separator, and a line break at its start is that of a word.
        """
        ends = ids == self._ids[EOS] if EOS in self else np.zeros(len(ids), bool)
        empty_lines = ends & np.concatenate([[False], ends[:-1]])
        return int(self._sizes[ids[~ends]].sum() + np.count_nonzero(empty_lines))

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """Bytes of each word and a separator, (len(self),) int64."""
        return np.array([len(word.encode()) + 1 for word in self.words], np.int64)

    def save(self, path: str | Path) -> None:
        """Write the words to a UTF-8 file, one a line."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(self.to_text())

    @classmethod
    def load(cls, path: str | Path, *, lower_case: bool | None = None) -> "Vocabulary":
        """Read a file that `save` wrote.

        Args:
            path: the file.
            lower_case: as in the constructor; None: true if no word has an upper-case letter.

        Raises:
            UserError: the file cannot be read, is empty, or contains a word twice.
        """
        text = read_text(path, MAX_BYTES, "the vocabulary")
        words = text.removesuffix("\n").split("\n") if text else []
        if not words or not all(words) or len(set(words)) != len(words):
            raise UserError(f"{path} is not a vocabulary: it must hold one word a line, each once")
        if lower_case is None:
            lower_case = all(word == word.lower() for word in words)
        return cls(words, lower_case=lower_case)
