"""Subword tokenizers: byte-level BPE by the `tokenizers` library, an optional dependency.

A tokenizer is one file, `tokenizer.json`, in the format of that library. It stands for a `Vocabulary` wherever text is encoded
or decoded.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deq_flax.data.text.vocabulary import MAX_BYTES
from deq_flax.errors import UserError
from deq_flax.untrusted.files import read_text

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
"""Token that ends each document, unless another is named."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library: text to ids and back.

    A text is a text: one that contains the name of a special token is encoded like any other, and ends no document.

    Args:
        tokenizer: the library's own object.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer"):
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`.

        Raises:
            UserError: the file cannot be read or is no tokenizer, or the library is not installed.
        """
        return cls.from_json(read_text(path, MAX_BYTES, "the tokenizer"), path)

    @classmethod
    def from_json(cls, text: str, path: str | Path) -> "Tokenizer":
        """Make a tokenizer of the content of a `tokenizer.json`. UserError as for `load`, with `path` as the file's name."""
        library = _library()
        try:
            return cls(library.Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path} is no tokenizer.json ({' '.join(str(error).split())[:200]})") from error

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int, end_of_text: str = END_OF_TEXT) -> "Tokenizer":
        """Train byte-level BPE (Sennrich et al. 2016, over bytes as in Radford et al. 2019) with `end_of_text` as id 0.

        Every text can be encoded and comes back exactly, since all 256 bytes are tokens.

        Args:
            pieces: the training text.
            vocab_size: number of tokens to reach, at least 257; a short text gives fewer.
            end_of_text: the token that ends a document.

        Raises:
            UserError: vocab_size is too small, or the library is not installed.
        """
        library = _library()
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise UserError(f"--vocab_size must be at least 257 (256 bytes and {end_of_text}), not {vocab_size}")
        tokenizer = library.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[end_of_text],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(pieces, trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        """The largest id and one: the size of a model's vocabulary. Ids may be missing in between."""
        return self._size

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` as ids (N,) int32, adding nothing before or after it. UserError: the tokenizer cannot encode it."""
        with _encoding():
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_many(self, texts: list[str]) -> list[np.ndarray]:
        """Encode each text by itself, in parallel. UserError as of `encode`."""
        with _encoding():
            encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text; bytes that are no UTF-8, as of a character cut in two, become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def stream(self, before: Iterable[int]) -> Callable[[int], str]:
        """Return a function from the next id to the text that it adds to that of `before`, '' while a character is incomplete.

        A token is decoded together with the ones before it, on which its space may depend.
        """
        context, pending = [int(i) for i in before][-8:], []

        def text_of(token: int) -> str:
            nonlocal context, pending
            pending.append(token)
            whole = self.decode(context + pending)
            if whole.endswith("\ufffd") and len(pending) < 4:  # a character has at most four bytes
                return ""
            added = whole[len(self.decode(context)) :]
            context, pending = pending, []
            return added

        return text_of

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""
        return self._tokenizer.to_str(pretty=True)


@contextmanager
def _encoding() -> Generator[None]:
    try:
        yield
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"the tokenizer cannot encode the text ({' '.join(str(error).split())[:200]}): use one that covers any text, by "
            "bytes or by an unknown token of its vocabulary"
        ) from error


def _library():
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("subword tokens need the package tokenizers: pip install tokenizers") from error
    return tokenizers
