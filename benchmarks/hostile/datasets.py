"""Data sets: idx files, CIFAR batches, token ids, texts in zip files, token caches, ArrayRecord files."""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.hostile import Case, SilentlyWrongError, damaged
from benchmarks.hostile.archives import METHODS, patched, write_bomb
from benchmarks.hostile.images import picture
from benchmarks.hostile.weights import PROTOCOL, nested, npy_headers, number

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
WORDS = {"train": b"a b c <unk>\n" * 50, "valid": b"a b\n", "test": b"c\n"}


def read_images(name: str, path: Path) -> None:
    from deq_flax.data.images.labeled_datasets import ImageOptions, load_images

    options = {"image_size": 8, "resize": 10} if name == "folders" else {}
    data = load_images(ImageOptions(name=name, path=str(path), **options))
    for split in (data.train, data.valid):
        split.read(np.arange(min(len(split), 8)), None)


def read_text(name: str, path: Path) -> None:
    from deq_flax.data.text.corpus import TextOptions, load_text

    corpus = load_text(TextOptions(name=name, path=str(path), cache=str(_root(path) / "cache")))
    for split in ("train", "valid", "test"):
        ids = np.asarray(corpus.split(split)[:1000])
        if ids.max() >= corpus.vocab_size:
            raise SilentlyWrongError(f"the id {ids.max()} of {corpus.vocab_size}")
    corpus.unigram_nll("valid")


def _root(path: Path) -> Path:
    """The folder of the case: the numbered one."""
    return next((folder for folder in (path, *path.parents) if folder.name.isdecimal()), path)


# Four idx files.


def idx(shape: tuple[int, ...], content: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(struct.pack(">I", n) for n in shape) + content


def write_idx(folder: Path, hostile: bytes | None = None, suffix: str = "") -> Path:
    for part, count in (("train", 12), ("t10k", 5)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx((count, 4, 4), bytes(16 * count)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx((count,), bytes(count)))
    if hostile is not None:
        (folder / "train-images-idx3-ubyte").unlink()
        (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(hostile)
    return folder


def idx_files() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    yield "sizes that wrap to nothing", lambda folder: write_idx(folder, idx((1 << 31, 1 << 31, 4), b""))
    yield "sizes that wrap to 16", lambda folder: write_idx(folder, idx((0x80000001, 0x80000000, 0x40000000), b""))
    yield (
        "sizes that wrap to their product",
        lambda folder: write_idx(folder, idx((1 << 16, 1 << 16, (1 << 32) - 1), bytes(16))),
    )
    yield "nothing of 4 x 4", lambda folder: write_idx(folder, idx((0, 4, 4), b""))
    yield "12 of nothing", lambda folder: write_idx(folder, idx((12, 0, 4), b""))
    for size in (1 << 30, 7_600_000_000):
        yield (
            f"gzip of {size >> 20} MB",
            lambda folder, size=size: write_idx(folder, _gzip_bomb(idx((size // 784, 28, 28), b""), size // 784 * 784), ".gz"),
        )
        yield (
            f"gzip of {size >> 20} MB that states 1 KB",
            lambda folder, size=size: write_idx(folder, _gzip_bomb(idx((12, 4, 4), b""), size), ".gz"),
        )
    yield "gzip in gzip", lambda folder: write_idx(folder, gzip.compress(gzip.compress(idx((12, 4, 4), bytes(192)))), ".gz")
    yield (
        "gzip of a million members",
        lambda folder: write_idx(folder, gzip.compress(b"") * 1_000_000 + gzip.compress(idx((12, 4, 4), bytes(192))), ".gz"),
    )
    yield "a pipe", lambda folder: _replaced(write_idx(folder) / "t10k-images-idx3-ubyte", os.mkfifo)
    yield (
        "/dev/zero",
        lambda folder: _replaced(write_idx(folder) / "t10k-images-idx3-ubyte", lambda path: path.symlink_to("/dev/zero")),
    )
    yield "1 TB of nothing", lambda folder: _replaced(write_idx(folder) / "t10k-images-idx3-ubyte", _sparse)


def _gzip_bomb(head: bytes, size: int) -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb") as file:
        file.write(head)
        for start in range(0, size, 1 << 24):
            file.write(bytes(min(1 << 24, size - start)))
    return stream.getvalue()


def _replaced(path: Path, put: Callable[[Path], object]) -> Path:
    path.unlink(missing_ok=True)
    put(path)
    return path.parent


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


# CIFAR-10.


def write_cifar(folder: Path, hostile: bytes | None = None, binary: bool = False) -> Path:
    for name in BATCHES:
        if binary:
            (folder / f"{name}.bin").write_bytes(bytes(3073 * 2))
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, protocol=2))
    if hostile is not None:
        (folder / (f"{BATCHES[-1]}.bin" if binary else BATCHES[-1])).write_bytes(hostile)
    return folder


def cifar_pickles() -> Iterator[tuple[str, bytes]]:
    for depth in (5_000, 1_000_000):
        for what, opening, closing in (("tuple", b"", b"\x85"), ("list", b"]", b"a"), ("dict", b"}K\x01", b"s")):
            deep = nested(depth, opening, closing)
            yield f"a {what} {depth} deep", PROTOCOL + deep + b"."
            yield f"a {what} {depth} deep as key", PROTOCOL + b"}" + deep + b"Ns."
            yield f"a {what} {depth} deep as labels", PROTOCOL + b"}(C\x06labels" + deep + b"C\x04datacnumpy\nndarray\n)Ru."
    yield "a place 2^31 in the memo", PROTOCOL + b"}r\xff\xff\xff\x7f."
    yield "a claim of 2^40 bytes", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."
    yield "bytes of 2^40", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."
    yield "16 million dictionaries", PROTOCOL + b"}" * (1 << 24) + b"."
    codec = PROTOCOL + b"X" + struct.pack("<I", 1 << 23) + b"a" * (1 << 23) + b"q\x01"
    codec += b"".join(b"c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86Rr" + struct.pack("<I", i) for i in range(2, 900))
    yield "a text encoded 900 times", codec + b"."
    state = b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nX\x02\0\0\0u1\x85R\x89C\x01at"
    yield "an array of one byte", PROTOCOL + b"}(C\x04datacnumpy\nndarray\n)R" + state + b"bC\x06labels](K\0K\1eu."
    yield "labels of 10^5000", PROTOCOL + b"}(C\x06labels](" + number(10**5000) + b"eu."
    yield "a message of 16 MB", PROTOCOL + b"c" + b"m" * (1 << 24) + b"\nf\n."
    yield "a list", PROTOCOL + b"]."


# Token ids, texts and caches.


def write_tokens(folder: Path, hostile: bytes) -> Path:
    for split in ("train", "valid", "test"):
        np.save(folder / f"{split}.npy", np.arange(20, dtype=np.int32))
    (folder / "valid.npy").write_bytes(hostile)
    return folder


def zip_of_words(folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w", method) as archive:
        for split, words in WORDS.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", words)
    return folder / "x.zip"


def write_words(folder: Path) -> Path:
    for split, words in WORDS.items():
        (folder / f"{split}.txt").write_bytes(words)
    return folder


def texts() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    for what, method in METHODS.items():
        yield f"compressed by {what}, damaged", lambda folder, method=method: _damaged_member(zip_of_words(folder, method))
    yield "damaged", lambda folder: _damaged_member(zip_of_words(folder))
    yield "encrypted", lambda folder: patched(zip_of_words(folder), flags=1)
    yield "an unknown method", lambda folder: patched(zip_of_words(folder), method=99)
    yield "sizes of 4 GB", lambda folder: patched(zip_of_words(folder), size=0xFFFFFFFE)
    members = {f"wiki.{split}.tokens": words for split, words in WORDS.items() if split != "train"}
    yield "4 GB of zeros", lambda folder: write_bomb(folder / "x.zip", members, "wiki.train.tokens", 1 << 32)
    yield "2 GB of one word", lambda folder: _word_bomb(folder / "x.zip")
    yield "a pipe", lambda folder: _replaced(write_words(folder) / "valid.txt", os.mkfifo)
    yield "/dev/zero", lambda folder: _replaced(write_words(folder) / "valid.txt", lambda path: path.symlink_to("/dev/zero"))
    yield (
        "/dev/urandom",
        lambda folder: _replaced(write_words(folder) / "train.txt", lambda path: path.symlink_to("/dev/urandom")),
    )
    yield (
        "a word of 64 MB",
        lambda folder: _replaced(write_words(folder) / "train.txt", lambda path: path.write_bytes(b"a" * (1 << 26))),
    )
    yield "12 million words", lambda folder: _replaced(write_words(folder) / "train.txt", _many_words)
    yield "no words", lambda folder: _replaced(write_words(folder) / "train.txt", lambda path: path.write_bytes(b" "))
    yield "no UTF-8", lambda folder: _replaced(write_words(folder) / "train.txt", lambda path: path.write_bytes(b"\xff " * 50))
    yield (
        "an unknown word of a megabyte",
        lambda folder: _replaced(
            _without_unknown(write_words(folder)) / "valid.txt", lambda path: path.write_bytes(b"z" * 1_000_000 + b" ")
        ),
    )


def _many_words(path: Path) -> None:
    with path.open("w") as file:
        for start in range(0, 12_000_000, 1 << 16):
            file.write(" ".join(map(hex, range(start, start + (1 << 16)))) + "\n")


def _without_unknown(folder: Path) -> Path:
    (folder / "train.txt").write_bytes(b"a b c\n")
    return folder


def _damaged_member(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(b"tokens") + 6
    data[at : at + 12] = bytes(12)
    path.write_bytes(data)
    return path


def _word_bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, words in WORDS.items():
            with archive.open(f"wiki.{split}.tokens", "w", force_zip64=True) as stream:
                for _ in range(2000 if split == "train" else 1):
                    stream.write(words if split != "train" else b"a b " * (1 << 18))
    return path


def caches() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(name, function that spoils the folder of a cache)."""

    def spoiled(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
        def spoil(folder: Path) -> None:
            meta = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(change(meta)))

        return spoil

    def written(name: str, content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(content)

    for split in ("train", "valid", "test"):
        yield (
            f"without {split}",
            spoiled(
                "meta.json",
                lambda meta, split=split: meta | {"tokens": {k: v for k, v in meta["tokens"].items() if k != split}},
            ),
        )
    yield "with a fourth split", spoiled("meta.json", lambda meta: meta | {"tokens": meta["tokens"] | {"train2": 1}})
    yield "with splits elsewhere", spoiled("meta.json", lambda meta: meta | {"tokens": {"../../x": 1, "train": 1, "valid": 1}})
    for what, value in (("a list", []), ("null", None), ("a number", 3), ("a text", "x"), ("true", True)):
        yield f"whose tokens are {what}", spoiled("meta.json", lambda meta, value=value: meta | {"tokens": value})
        yield f"that is {what}", spoiled("meta.json", lambda meta, value=value: value)
        yield (
            f"whose lengths are {what}",
            spoiled("meta.json", lambda meta, value=value: meta | {"tokens": dict.fromkeys(meta["tokens"], value)}),
        )
    yield "100,000 deep", written("meta.json", b"[" * 100_000)
    yield "that is no UTF-8", written("meta.json", b"\xff\xfe")
    yield "without vocabulary", lambda folder: (folder / "vocabulary.txt").unlink()
    yield "with a pipe as vocabulary", lambda folder: _replaced(folder / "vocabulary.txt", os.mkfifo)
    yield "with a pipe as meta.json", lambda folder: _replaced(folder / "meta.json", os.mkfifo)
    yield "with a pipe as array", lambda folder: _replaced(folder / "train.npy", os.mkfifo)
    yield (
        "with /dev/zero as vocabulary",
        lambda folder: _replaced(folder / "vocabulary.txt", lambda path: path.symlink_to("/dev/zero")),
    )
    yield "with another vocabulary", written("vocabulary.txt", b"a\nb\n")
    yield "with ids beyond the vocabulary", lambda folder: np.save(folder / "valid.npy", np.full(3, 10**6, np.int32))
    for name, content in npy_headers():
        yield f"with an array of {name}", written("valid.npy", content)


def read_spoiled(spoil: Callable[[Path], object], path: Path) -> None:
    (folder,) = [folder for folder in (_root(path) / "cache").iterdir() if not folder.name.startswith(".")]
    spoil(folder)
    read_text("wt103", path)


# ArrayRecord.


def field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(x: int) -> bytes:
    out = bytearray()
    while x > 0x7F:
        out.append(x & 0x7F | 0x80)
        x >>= 7
    return bytes([*out, x])


def example(image: bytes | None, label: bytes | None, key: bytes = b"label") -> bytes:
    entries = b""
    if image is not None:
        entries += field(1, field(1, b"image") + field(2, field(1, field(1, image))))
    if label is not None:
        entries += field(1, field(1, key) + field(2, field(3, field(1, label))))
    return field(1, entries)


def write_records(folder: Path, record: bytes | None = None, labels: bytes = b"cat\ndog\n") -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    (folder / "label.labels.txt").write_bytes(labels)
    whole = example(picture("PNG"), b"\x01")
    for split, records in (("train", [whole] * 3), ("validation", [whole, whole if record is None else record])):
        writer = ArrayRecordWriter(str(folder / f"pets-{split}.array_record-00000-of-00001"), "group_size:1")
        for each in records:
            writer.write(each)
        writer.close()
    return folder


def records() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    image = picture("PNG")
    odd = {
        "without a key": field(1, field(1, field(2, field(3, field(1, b"\x01"))))),
        "with a number as key": field(1, field(1, b"\x08\x05" + field(2, b""))),
        "with a key that is no text": example(image, b"\x01", b"\xff\xfe"),
        "without an image": example(None, b"\x01"),
        "without a label": example(image, None),
        "with the label 2": example(image, b"\x02"),
        "with the label -1": example(image, b"\xff" * 9 + b"\x01"),
        "with the label 10^5000": example(image, b"\xff" * 100_000 + b"\x01"),
        "with an unending label": example(image, b"\xff" * 10),
        "empty": b"",
        "of zeros": bytes(1000),
        "of ones": b"\xff" * 1000,
        "cut off": example(image, b"\x01")[:50],
        "of groups": b"\x0b" * 100,
        "of a million fields": field(1, field(1, b"") * 1_000_000),
        "whose image is a PostScript program": example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", b"\x00"),
    }
    for name, record in odd.items():
        yield f"a record {name}", lambda folder, record=record: write_records(folder, record)
    for name, labels in (
        ("empty", b""),
        ("no UTF-8", b"\xff\xfe\n"),
        ("without line break", b"cat"),
        ("of zeros", bytes(1 << 20)),
    ):
        yield f"labels {name}", lambda folder, labels=labels: write_records(folder, labels=labels)
    yield "no labels", lambda folder: _replaced(write_records(folder) / "label.labels.txt", lambda path: None)
    for name, put in (
        ("a pipe", os.mkfifo),
        ("/dev/zero", lambda path: path.symlink_to("/dev/zero")),
        ("a folder", Path.mkdir),
    ):
        yield f"labels that are {name}", lambda folder, put=put: _replaced(write_records(folder) / "label.labels.txt", put)
        yield (
            f"a shard that is {name}",
            lambda folder, put=put: _replaced(write_records(folder) / "pets-validation.array_record-00000-of-00001", put),
        )
    yield (
        "an empty shard",
        lambda folder: _replaced(write_records(folder) / "pets-validation.array_record-00000-of-00001", Path.touch),
    )


def _damaged_records(seed: int, folder: Path) -> Path:
    path = write_records(folder) / "pets-validation.array_record-00000-of-00001"
    path.write_bytes(damaged(path.read_bytes(), np.random.default_rng(seed)))
    return folder


def cases(random: np.random.Generator) -> Iterator[Case]:
    for name, make in idx_files():
        yield Case("data: idx files", name, make, partial(read_images, "mnist"))
    plain, packed = idx((12, 4, 4), bytes(192)), gzip.compress(idx((12, 4, 4), bytes(range(192))))
    for i in range(15):
        for suffix, data in (("", plain), (".gz", packed)):
            make = partial(lambda content, suffix, folder: write_idx(folder, content, suffix), damaged(data, random), suffix)
            yield Case("data: idx files", f"damage {i}{suffix}", make, partial(read_images, "mnist"))
    for name, content in cifar_pickles():
        yield Case(
            "data: CIFAR-10",
            name,
            partial(lambda content, folder: write_cifar(folder, content), content),
            partial(read_images, "cifar10"),
        )
    whole = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}, protocol=2)
    for i in range(20):
        yield Case(
            "data: CIFAR-10",
            f"damage {i}",
            partial(lambda content, folder: write_cifar(folder, content), damaged(whole, random)),
            partial(read_images, "cifar10"),
        )
    for name, content in (("no whole record", bytes(3072)), ("a label of 200", b"\xc8" + bytes(3072)), ("nothing", b"")):
        yield Case(
            "data: CIFAR-10",
            f"binary, {name}",
            partial(lambda content, folder: write_cifar(folder, content, binary=True), content),
            partial(read_images, "cifar10"),
        )
    for name, content in npy_headers():
        yield Case(
            "data: token ids",
            name,
            partial(lambda content, folder: write_tokens(folder, content), content),
            partial(read_text, "tokens"),
        )
    for name, put in (
        ("a pipe", os.mkfifo),
        ("/dev/zero", lambda path: path.symlink_to("/dev/zero")),
        ("a folder", Path.mkdir),
    ):
        yield Case(
            "data: token ids",
            name,
            lambda folder, put=put: _replaced(write_tokens(folder, b"") / "valid.npy", put),
            partial(read_text, "tokens"),
        )
    stream = io.BytesIO()
    np.save(stream, np.arange(20, dtype=np.int32))
    for i in range(15):
        yield Case(
            "data: token ids",
            f"damage {i}",
            partial(lambda content, folder: write_tokens(folder, content), damaged(stream.getvalue(), random)),
            partial(read_text, "tokens"),
        )
    for name, make in texts():
        yield Case("data: texts", name, make, partial(read_text, "wt103"))

    def cached(folder: Path) -> Path:
        (folder / "data").mkdir()
        read_text("wt103", write_words(folder / "data"))
        return folder / "data"

    for name, spoil in caches():
        yield Case("data: token caches", name, cached, partial(read_spoiled, spoil))
    for name, make in records():
        yield Case("data: ArrayRecord", name, make, partial(read_images, "folders"))
    for i in range(25):
        yield Case("data: ArrayRecord", f"damage {i}", partial(_damaged_records, i), partial(read_images, "folders"))
