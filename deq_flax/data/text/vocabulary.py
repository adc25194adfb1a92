"""Words and their ids, in the order of the Transformer-XL vocabularies that published checkpoints were trained with."""

import collections
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deq_flax.errors import UserError

EOS = "<eos>"
UNK = "<unk>"


def count_words(pieces: Iterable[str], *, lower_case: bool = False) -> collections.Counter:
    """How often each whitespace-separated word occurs, in the order of first appearance."""
    counts = collections.Counter()
    for piece in pieces:
        counts.update((piece.lower() if lower_case else piece).split())
    return counts


class _Ids(dict):
    """Word to id; a word that is not there has the id of '<unk>'."""

    def __missing__(self, word: str) -> int:
        unknown = self.get(UNK)
        if unknown is None:
            raise UserError(f"the word {word!r} is not in the vocabulary, which has no {UNK!r} to stand for it")
        return unknown


class Vocabulary:
    """An ordered set of words; a word's id is its place in it.

    Args:
        words: the words in order of their ids, each once.
        lower_case: whether text is lower-cased before its words are looked up.

    Raises:
        ValueError: a word stands there twice.
    """

    def __init__(self, words: Iterable[str], *, lower_case: bool = False):
        self.words = tuple(words)
        self.lower_case = lower_case
        self._ids = _Ids((word, index) for index, word in enumerate(self.words))
        if len(self._ids) != len(self.words):
            raise ValueError("a word stands in the vocabulary twice")

    @classmethod
    def from_counts(cls, counts: collections.Counter, *, lower_case: bool = False) -> "Vocabulary":
        """'<eos>', then the words by falling count, equal counts by first appearance."""
        ranked = (word for word, _ in counts.most_common() if word != EOS)
        return cls((EOS, *ranked), lower_case=lower_case)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def id_of(self, word: str) -> int:
        """The id of a word, that of '<unk>' if it is unknown. Raises UserError if there is no '<unk>' either."""
        return self._ids[word]

    def encode(self, text: str) -> np.ndarray:
        """The ids (N,) int32 of the words of `text`, every line break standing for one '<eos>'.

        A last line without a line break gets no '<eos>', so a prompt can be continued.

        Raises:
            UserError: a word is unknown and the vocabulary has no '<unk>'.
        """
        text = text.lower() if self.lower_case else text
        words = text.replace("\n", f" {EOS} ").split()
        return np.fromiter(map(self._ids.__getitem__, words), np.int32, count=len(words))

    def decode(self, ids: Iterable[int]) -> str:
        """The words of `ids` with spaces between them, '<eos>' as a line break; the inverse of `encode` up to spacing.

        Raises:
            IndexError: an id is negative or no less than the number of words.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self.words)):
            raise IndexError(f"ids must be from 0 to {len(self.words) - 1}, got {ids.min()} to {ids.max()}")
        lines = " ".join(self.words[index] for index in ids).split(EOS)
        return "\n".join(line.strip(" ") for line in lines)

    def save(self, path: str | Path) -> None:
        """Write the words, one a line, UTF-8."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{word}\n" for word in self.words)

    @classmethod
    def load(cls, path: str | Path, *, lower_case: bool | None = None) -> "Vocabulary":
        """Read what `save` wrote. `lower_case` None: true if no word has an upper-case letter.

        Raises:
            UserError: the file cannot be read, is empty, or holds a word twice.
        """
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the vocabulary {path} is not UTF-8 text") from error
        words = text.removesuffix("\n").split("\n") if text else []
        if not words or not all(words) or len(set(words)) != len(words):
            raise UserError(f"{path} is not a vocabulary: it must hold one word a line, each once")
        if lower_case is None:
            lower_case = all(word == word.lower() for word in words)
        return cls(words, lower_case=lower_case)
