"""Cache of encoded texts: `{split}.npy`, `vocabulary.txt` and `meta.json` in a folder named by a hash of their sources."""

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from deq_flax.data.loading import SPLITS
from deq_flax.data.text.arrays import map_npy
from deq_flax.data.text.files import TextFile
from deq_flax.data.text.vocabulary import Vocabulary, count_words
from deq_flax.errors import UserError
from deq_flax.untrusted.files import read_json

FORMAT = 1
"""Version of the cache; part of the folder's hash."""
QUIET_BYTES = 1 << 25
"""Texts smaller than this are encoded without a progress bar."""

Encoded = tuple[dict[str, np.ndarray], Vocabulary]
"""Token ids (N,) int32 of each split, and the vocabulary."""


def cache_root(cache: str) -> Path:
    """The folder of all caches: `cache`, or deq_flax in the user's cache folder if `cache` is empty.

    Raises:
        UserError: there is no home folder.
    """
    try:
        if cache:
            return Path(cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deq_flax"
    except RuntimeError as error:
        raise UserError(f"no folder for the token cache ({error}): set data.cache to one that can be written") from error


def load_or_encode(
    name: str, texts: Mapping[str, TextFile], *, lower_case: bool, counted: Sequence[str], cache: str = ""
) -> Encoded:
    """Load the memory-mapped token ids of each split and the vocabulary from the cache, after encoding them if necessary.

    Args:
        name: the name of the text; the folder's name begins with it.
        texts: the files by split.
        lower_case: convert words to lower case.
        counted: the splits whose words form the vocabulary.
        cache: the folder of all caches; empty: `$XDG_CACHE_HOME/deq_flax` or `~/.cache/deq_flax`.

    Raises:
        UserError: a text cannot be read or contains an unknown word, or the cache cannot be written.
    """
    recipe = [FORMAT, lower_case, list(counted), {split: text.stamp() for split, text in texts.items()}]
    fingerprint = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    folder = cache_root(cache) / f"{name}-{fingerprint}"
    found = _open(folder)
    if found is not None:
        return found
    sizes = {split: text.size() for split, text in texts.items()}
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.mkdir(parents=True)
        _encode(name, texts, sizes, scratch, lower_case=lower_case, counted=counted)
        return _publish(scratch, folder)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache {folder} ({error.strerror or error}): set data.cache to a folder "
            "that can be written and has room"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _encode(
    name: str,
    texts: Mapping[str, TextFile],
    sizes: Mapping[str, int],
    folder: Path,
    *,
    lower_case: bool,
    counted: Sequence[str],
) -> None:
    """Write the cache into `folder`. The texts are read twice: to count their words, and to encode them."""
    total = sum(sizes.values()) + sum(sizes[split] for split in counted)
    with tqdm(
        total=total, desc=f"encoding {name}", unit="B", unit_scale=True, file=sys.stderr, disable=total < QUIET_BYTES
    ) as bar:
        words = (piece for split in counted for piece in texts[split].pieces(bar.update))
        vocabulary = Vocabulary.from_counts(count_words(words, lower_case=lower_case), lower_case=lower_case)
        lengths = {}
        for split, text in texts.items():
            with open(folder / f"{split}.npy", "wb") as out:
                lengths[split] = write_tokens(out, _ids_of(text, vocabulary, bar.update), np.int32)
    vocabulary.save(folder / "vocabulary.txt")
    meta = {"format": FORMAT, "lower_case": lower_case, "vocab_size": len(vocabulary), "tokens": lengths}
    meta["sources"] = {split: str(text) for split, text in texts.items()}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _ids_of(text: TextFile, vocabulary: Vocabulary, progress: Callable[[int], object]) -> Iterator[np.ndarray]:
    for piece in text.pieces(progress):
        try:
            yield vocabulary.encode(piece)
        except UserError as error:
            raise UserError(f"{text}: {error}") from error


def write_tokens(out: BinaryIO, pieces: Iterable[np.ndarray], dtype: DTypeLike) -> int:
    """Write pieces of ids as one .npy file and return its length. The header is rewritten once the length is known."""
    little_endian = np.dtype(dtype).newbyteorder("<")

    def write_header(n_tokens: int) -> int:
        header = {"descr": little_endian.str, "fortran_order": False, "shape": (n_tokens,)}
        np.lib.format.write_array_header_1_0(out, header)
        return out.tell()

    n_tokens, start = 0, write_header(0)
    for ids in pieces:
        out.write(ids.astype(little_endian, copy=False).data)
        n_tokens += len(ids)
    out.seek(0)
    assert write_header(n_tokens) == start, "numpy pads the header for any length"
    return n_tokens


def _publish(scratch: Path, folder: Path) -> Encoded:
    """Rename the finished folder and open it. If another process has published the same cache first, open that."""
    try:
        scratch.rename(folder)
    except OSError:
        found = _open(folder)
        if found is not None:
            return found
        damaged = folder.with_name(f"{scratch.name}.damaged")
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        scratch.rename(folder)
    found = _open(folder)
    if found is None:
        raise UserError(f"the token cache {folder} was written but cannot be read back: delete it and try again")
    return found


def _open(folder: Path) -> Encoded | None:
    """Open a cache folder; None if it is absent, incomplete or damaged."""
    try:
        meta = read_json(folder / "meta.json")
        lengths = {split: meta["tokens"][split] for split in SPLITS}
        tokens = {split: map_npy(folder / f"{split}.npy") for split in lengths}
        vocabulary = Vocabulary.load(folder / "vocabulary.txt", lower_case=meta["lower_case"])
        whole = len(vocabulary) == meta["vocab_size"] and all(
            tokens[split].shape == (length,) and tokens[split].dtype == np.int32 for split, length in lengths.items()
        )
        whole = whole and all(ids.min() >= 0 and ids.max() < len(vocabulary) for ids in tokens.values() if len(ids))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return (tokens, vocabulary) if whole else None
