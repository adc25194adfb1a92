"""Encode text files as subword tokens, for `data.name=tokens`.

  python -m deq_flax.tokenize --input FILE_OR_FOLDER [--input ...] --vocab_size 8000 DIR

Trains byte-level BPE on the text, or takes an existing one (--tokenizer FILE), and writes train.npy, valid.npy and test.npy of
token ids, tokenizer.json and corpus.json into the new folder DIR. Folders are searched for files of any name. Without --valid
and --test the text's last parts are held out. Each file is a document, with a token after it. Needs the package tokenizers.
"""

import json
import math
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from deq_flax import cli
from deq_flax.data.loading import SPLITS
from deq_flax.data.text.cache import QUIET_BYTES, write_tokens
from deq_flax.data.text.corpus import CORPUS_FILE
from deq_flax.data.text.documents import Documents, Piece
from deq_flax.data.text.tokenizer import END_OF_TEXT, TOKENIZER_FILE, Tokenizer
from deq_flax.errors import UserError

_FLAGS = flags.FlagValues()  # not the global ones, so that this module can be imported beside other commands
_INPUT = flags.DEFINE_multi_string("input", None, "text file or folder; may be repeated", flag_values=_FLAGS)
_VALID = flags.DEFINE_multi_string("valid", [], "the same for the validation split", flag_values=_FLAGS)
_TEST = flags.DEFINE_multi_string("test", [], "the same for the test split", flag_values=_FLAGS)
_HELD_OUT = flags.DEFINE_float(
    "held_out", 0.02, "share of --input for each of valid and test where these are not given", flag_values=_FLAGS
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8000, "number of tokens to train", flag_values=_FLAGS)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer.json to use instead of training one", flag_values=_FLAGS)
_END_OF_TEXT = flags.DEFINE_string("end_of_text", END_OF_TEXT, "token that ends each document", flag_values=_FLAGS)

BATCH = 64
"""Pieces that are encoded in parallel."""


def main(folder: str) -> dict[str, Any]:
    """Run the command; returns its result."""
    out = Path(folder)
    cli.require(not out.exists(), f"{out} exists: give a new folder, or delete it")
    cli.require(bool(_VALID.value) == bool(_TEST.value), "give both --valid and --test, or neither")
    cli.require(0 < _HELD_OUT.value < 0.5, f"--held_out must be above 0 and below 0.5, not {_HELD_OUT.value}")
    end_of_text = _END_OF_TEXT.value
    cli.require(bool(end_of_text), "--end_of_text is empty: name a token")
    splits = find_splits(_INPUT.value or [], _VALID.value, _TEST.value, _HELD_OUT.value)
    scratch = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.mkdir(parents=True)
        if _TOKENIZER.value:
            tokenizer = load(_TOKENIZER.value, end_of_text, splits)
        else:
            tokenizer = train(splits["train"], _VOCAB_SIZE.value, end_of_text)
        (scratch / TOKENIZER_FILE).write_text(tokenizer.to_json(), encoding="utf-8")
        facts = {split: encode(tokenizer, text, scratch / f"{split}.npy", split, end_of_text) for split, text in splits.items()}
        meta = {"vocab_size": len(tokenizer)} | {key: {s: f[key] for s, f in facts.items()} for key in ("tokens", "bytes")}
        (scratch / CORPUS_FILE).write_text(json.dumps(meta, indent=1))
        scratch.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for split, fact in facts.items():
        per_token = fact["bytes"] / max(fact["tokens"], 1)
        print(f"{split}: {fact['tokens']:,} tokens, {fact['bytes']:,} bytes, {per_token:.2f} bytes a token")
    _warn_of_invalid(splits)
    print(f"{out}: a vocabulary of {len(tokenizer)}; train with --config.data.name=tokens --config.data.path={out}")
    return {"folder": str(out)} | meta


def find_splits(places: list[str], valid: list[str], test: list[str], held_out: float) -> dict[str, Documents]:
    """Find the text of each split: separate files, or the last parts of one text."""
    text = Documents.find(places)
    if valid:
        return {"train": text, "valid": Documents.find(valid, "--valid"), "test": Documents.find(test, "--test")}
    size = text.size()
    bounds = [0, (1 - 2 * held_out) * size, (1 - held_out) * size, math.inf]
    return {split: text.part(*bounds[i : i + 2]) for i, split in enumerate(SPLITS)}


def load(file: str, end_of_text: str, splits: dict[str, Documents]) -> Tokenizer:
    """Read a tokenizer. One that has no end of text gets a warning on stderr if there are documents to separate.

    Raises:
      UserError: it cannot be read, or lacks the end of text that the command line names.
    """
    tokenizer = Tokenizer.load(file)
    if tokenizer.id_of(end_of_text) is None:
        named = _FLAGS["end_of_text"].present
        cli.require(not named, f"--end_of_text: {file} has no token {end_of_text!r}: name the one that ends its documents")
        if any(len(text.files) > 1 for text in splits.values()):
            print(
                f"warning: {file} has no token {end_of_text}, so the documents run together: name another with --end_of_text",
                file=sys.stderr,
            )
    return tokenizer


def train(text: Documents, vocab_size: int, end_of_text: str) -> Tokenizer:
    """Train a tokenizer, with progress on stderr."""
    with _progress("training the tokenizer", text.size()) as update:

        def pieces() -> Iterator[str]:
            for piece in text.pieces():
                yield piece.text
                update(piece.size)

        return Tokenizer.train(pieces(), vocab_size, end_of_text)


def encode(tokenizer: Tokenizer, text: Documents, file: Path, split: str, end_of_text: str) -> dict[str, int]:
    """Encode a split into an .npy file, with progress on stderr. Returns its numbers of tokens and of bytes.

    Raises:
      UserError: there is no text, or only one token, or the tokenizer cannot encode it.
    """
    n_bytes, end = 0, tokenizer.id_of(end_of_text)
    end_of_document = np.array([] if end is None else [end], np.int32)

    def ids_of(pieces: Iterator[Piece]) -> Iterator[np.ndarray]:
        nonlocal n_bytes
        while batch := list(islice(pieces, BATCH)):
            for piece, ids in zip(batch, tokenizer.encode_many([piece.text for piece in batch]), strict=True):
                yield ids
                if piece.ends:
                    yield end_of_document
                n_bytes += piece.size
                update(piece.size)

    with open(file, "wb") as out, _progress(f"encoding {split}", text.size()) as update:
        n_tokens = write_tokens(out, ids_of(text.pieces()), np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)
    if n_tokens < 2:
        held_out = "" if split == "train" else f", or raise --held_out, or give --{split}"
        raise UserError(f"the {split} split has {n_tokens} tokens: give more text{held_out}")
    return {"tokens": n_tokens, "bytes": n_bytes}


@contextmanager
def _progress(what: str, size: int) -> Generator[Callable[[int], object]]:
    with tqdm(total=size, desc=what, unit="B", unit_scale=True, file=sys.stderr, disable=size < QUIET_BYTES) as bar:
        yield bar.update


def _warn_of_invalid(splits: dict[str, Documents]) -> None:
    """Name the files that are not UTF-8, on stderr."""
    invalid: Counter[Path] = Counter()
    for text in splits.values():
        invalid.update(text.invalid)
    for file, count in sorted(invalid.items())[:10]:
        print(f"warning: {file}: {count} byte sequences are not UTF-8; they were read as U+FFFD", file=sys.stderr)
    if len(invalid) > 10:
        print(f"warning: {len(invalid) - 10} more files are not UTF-8", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, required=("input",), positional=("DIR",), flag_values=_FLAGS)
