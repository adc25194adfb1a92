"""Texts are found and encoded once; every problem with them is reported in one line."""

import json
import math
import os
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deq_flax.data.text import corpus as corpora
from deq_flax.data.text import files as text_files
from deq_flax.data.text import pydoc as pydoc_text
from deq_flax.data.text.corpus import Corpus, TextOptions, load_text
from deq_flax.data.text.pydoc import pydoc_corpus, split_topics, unique_paragraphs
from deq_flax.data.text.vocabulary import UNK
from deq_flax.errors import UserError


def load(name, path="", cache="", vocab_size=0):
    return load_text(TextOptions(name=name, path=path, cache=cache), vocab_size)


TEXTS = {"train": " a b a <unk> \n\n c é\n", "valid": "a c\n", "test": "b Q\n"}


def write(folder, pattern, texts=TEXTS):
    folder.mkdir(exist_ok=True)
    for split, text in texts.items():
        (folder / pattern.format(split)).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder)


def error_of(*args, **options):
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def zip_of(path, folder="wikitext-103/"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in TEXTS.items():
            archive.writestr(f"{folder}wiki.{split}.tokens", text)
    return str(path)


@pytest.mark.parametrize("kind", ["tokens", "plain", "zip", "folder of the zip"])
def test_wikitext_is_the_same_from_files_and_from_the_zip(tmp_path, cache, kind):
    data = tmp_path / "data"
    data.mkdir()
    path = str(data)
    if "zip" in kind:
        zipped = zip_of(data / "wikitext-103-v1.zip")
        path = zipped if kind == "zip" else path
    else:
        write(data, "wiki.{}.tokens" if kind == "tokens" else "{}.txt")
    corpus = load("wt103", path, cache)
    assert corpus.vocabulary.words == ("<eos>", "a", "b", "<unk>", "c", "é")
    assert corpus.train.tolist() == [1, 2, 1, 3, 0, 0, 4, 5, 0]
    assert corpus.test.tolist() == [2, 3, 0]
    assert corpus.valid.dtype == np.int32


def test_penn_treebank_is_lower_cased_and_counts_every_split(tmp_path, cache):
    corpus = load("ptb", write(tmp_path / "d", "ptb.{}.txt", {"train": "A b\n", "valid": "B c", "test": "C B d\n"}), cache)
    assert corpus.vocabulary.words == ("<eos>", "b", "c", "a", "d")
    assert corpus.valid.tolist() == [1, 2, 0]


@pytest.mark.parametrize("end", ["last word", "last line\n", "last line\r", "\r\n"])
def test_pieces_join_to_the_text_whatever_their_size(tmp_path, monkeypatch, end):
    path = tmp_path / "t"
    path.write_bytes(("αβγ δε\r\nζ\r\rη " * 20 + end).encode())
    expected = path.read_text(encoding="utf-8")  # with universal line breaks
    for size in (13, 17, 64, 1000):
        monkeypatch.setattr(text_files, "PIECE_BYTES", size)
        pieces = list(text_files.TextFile(path).pieces())
        assert "".join(pieces) == expected.removesuffix("\n") + "\n"
        assert all(piece[-1].isspace() for piece in pieces[:-2])


def test_the_cache_is_used_until_a_source_changes(tmp_path, cache):
    path = write(tmp_path / "d", "{}.txt")
    first = load("wt103", path, cache).train
    assert isinstance(first, np.memmap)
    assert load("wt103", path, cache).train.filename == first.filename
    os.utime(tmp_path / "d" / "test.txt", ns=(1, 1))
    changed = load("wt103", path, cache).train
    assert changed.filename != first.filename
    assert len(os.listdir(cache)) == 2


def test_several_may_encode_the_same_text_at_once(tmp_path, cache):
    path = write(tmp_path / "d", "{}.txt", TEXTS | {"train": "a b c é <unk>\n" * 2000})
    with ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(lambda _: load("wt103", path, cache), range(4)))
    assert {corpus.train.tobytes() for corpus in corpora} == {corpora[0].train.tobytes()}
    assert len(os.listdir(cache)) == 1


@pytest.mark.parametrize("victim", ["meta.json", "train.npy", "vocabulary.txt"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, victim):
    path = write(tmp_path / "d", "{}.txt")
    before = load("wt103", path, cache)
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / victim).write_bytes((folder / victim).read_bytes()[:-4])
    after = load("wt103", path, cache)
    assert after.train.tolist() == before.train.tolist()
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]
    assert json.loads((folder / "meta.json").read_text())["tokens"]["train"] == len(after.train)


def test_the_default_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load("wt103", write(tmp_path / "d", "{}.txt"))
    (folder,) = (tmp_path / "xdg" / "deq_flax").iterdir()
    assert folder.name.startswith("wt103-")


def test_a_cache_that_cannot_be_written_names_the_override(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert "data.cache" in error_of("wt103", write(tmp_path / "d", "{}.txt"), str(tmp_path / "file"))


def test_a_failed_encoding_leaves_nothing(tmp_path, cache):
    path = write(tmp_path / "d", "{}.txt", {"train": "a\n", "valid": "a\n", "test": "strange\n"})
    message = error_of("wt103", path, cache)
    assert "test.txt" in message and "'strange'" in message
    assert not os.listdir(cache)


@pytest.mark.parametrize(
    ("name", "file", "published"),
    [("ptb", "ptb.{train,valid,test}.txt", "Mikolov"), ("wt103", "wiki.{train,valid,test}", "zip")],
)
def test_missing_data_names_the_files_and_their_source(tmp_path, name, file, published):
    for path in ("", str(tmp_path), str(tmp_path / "absent")):
        message = error_of(name, path)
        assert file in message and published in message and "data.path" in message
    (tmp_path / "train.txt").write_text("a\n")
    assert "valid.txt, test.txt" in error_of(name, str(tmp_path))


def test_bad_files_are_named(tmp_path, cache):
    for index, bad in enumerate((b"", b"a \xff\n", b"x" * (text_files.PIECE_BYTES + 1))):
        path = write(tmp_path / str(index), "{}.txt", TEXTS | {"valid": bad})
        assert "valid.txt" in error_of("ptb", path, cache)
    (tmp_path / "0" / "valid.txt").unlink()
    (tmp_path / "0" / "valid.txt").mkdir()
    assert "valid.txt: Is a directory" in error_of("ptb", str(tmp_path / "0"), cache)


def test_bad_zip_files_are_named(tmp_path, cache):
    zip_of(tmp_path / "good.zip")
    good = bytearray((tmp_path / "good.zip").read_bytes())
    contents = {"text": b"no zip", "half": good[: len(good) // 2], "raw": None}
    good[len("wikitext-103/wiki.train.tokens") + 32] ^= 255
    contents["flipped"] = good
    for name, content in contents.items():
        path = tmp_path / f"{name}.zip"
        if content is None:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("wiki.train.raw", "a")
        else:
            path.write_bytes(content)
        assert f"{name}.zip" in error_of("wt103", str(path), cache)


def save_tokens(folder, **changes):
    folder.mkdir(exist_ok=True)
    for split in ("train", "valid", "test"):
        np.save(folder / f"{split}.npy", changes.get(split, np.arange(5, dtype=np.int32)))
    return str(folder)


def test_ready_made_tokens_are_mapped(tmp_path):
    path = save_tokens(tmp_path, test=np.array([7, 0], np.uint16))
    corpus = load("tokens", path)
    assert (corpus.vocab_size, corpus.vocabulary, corpus.test.tolist()) == (8, None, [7, 0])
    assert isinstance(corpus.train, np.memmap)
    assert load("tokens", path, vocab_size=100).vocab_size == 100
    assert "holds the id 7" in error_of("tokens", path, vocab_size=7)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2), np.int32), np.zeros(2), np.array([0, -1]), np.zeros(0, np.int32), np.array([None])], ids=str
)
def test_bad_tokens_are_named(tmp_path, bad):
    assert "valid.npy" in error_of("tokens", save_tokens(tmp_path, valid=bad))


def test_unreadable_tokens_are_named(tmp_path):
    save_tokens(tmp_path)
    whole = (tmp_path / "test.npy").read_bytes()
    for content in (b"", b"not an array", whole[:-1], whole[:60]):
        (tmp_path / "test.npy").write_bytes(content)
        assert "test.npy" in error_of("tokens", str(tmp_path))
    (tmp_path / "test.npy").unlink()
    assert "test.npy does not exist" in error_of("tokens", str(tmp_path))
    assert "data.path" in error_of("tokens")


def test_unknown_names_list_the_known():
    assert all(name in error_of("wikitext") for name in corpora.TEXTS)
    tokens = np.zeros(2, np.int32)
    with pytest.raises(UserError, match="train, valid, test"):
        Corpus(train=tokens, valid=tokens, test=tokens, vocab_size=1).split("dev")


def test_a_text_larger_than_the_model_is_refused(tmp_path, cache):
    path = write(tmp_path / "d", "{}.txt")
    assert load("wt103", path, cache, vocab_size=6).vocab_size == 6
    assert "6 words" in error_of("wt103", path, cache, vocab_size=5)


def test_unigram_nll_is_the_smoothed_cross_entropy():
    train, valid = np.array([0, 1, 1, 2], np.int32), np.array([0, 1, 3], np.int32)
    corpus = Corpus(train=train, valid=valid, test=train, vocab_size=4)
    assert corpus.unigram_nll("valid") == pytest.approx(-(math.log(3 / 8) + math.log(1 / 8)) / 2)


def test_pydoc_is_english_in_three_disjoint_parts():
    corpus = load("pydoc")
    sizes = np.array([len(corpus.split(split)) for split in ("train", "valid", "test")])
    np.testing.assert_allclose(sizes / sizes.sum(), [0.85, 0.08, 0.07], atol=0.03)
    assert sizes.sum() > 30_000 and 1000 < corpus.vocab_size < 5000
    texts, _ = pydoc_corpus()
    lines = {split: {line for line in text.splitlines() if UNK not in line} for split, text in texts.items()}
    assert not lines["train"] & (lines["valid"] | lines["test"]) and not lines["valid"] & lines["test"]
    counts = Counter(texts["train"].split())
    assert min(counts[word] for word in corpus.vocabulary.words[1:]) >= pydoc_text.MIN_COUNT
    assert math.log(50) < corpus.unigram_nll("valid") < math.log(500)


def test_topics_share_no_paragraph_and_stay_whole():
    topics = {"big": ["p q", "r", "s t"], "small": ["r"], "two": ["p q", "u"]}
    assert unique_paragraphs(topics) == {"big": ["s t"], "small": ["r"], "two": ["p q", "u"]}
    splits = split_topics({str(topic): [f"{topic} a b", f"{topic} c"] for topic in range(100)})
    lines = [*splits["train"], *splits["valid"], *splits["test"]]
    assert sorted(lines) == sorted(f"{topic} {end}" for topic in range(100) for end in ("a b", "c"))
    for split, share in pydoc_text.SHARES.items():
        assert share - 0.02 <= len(splits[split]) / 200 <= share
        assert {line.split()[0] for line in splits[split]}.isdisjoint(line.split()[0] for line in splits["train"])


def npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(16)


FORM = "{'descr': %s, 'fortran_order': False, 'shape': %s}\n"


@pytest.mark.parametrize(
    "header",
    [
        "(" * 5_000 + ")" * 5_000,
        "[1]",
        FORM % ("'<i4'", "(10**30,)"),
        FORM % ("'<i4'", f"({10**30},)"),
        FORM % ("'<i4'", "(-4,)"),
        FORM % ("'<i4'", "(4.0,)"),
        FORM % ("'<i4'", "('4',)"),
        FORM % ("'<i4'", f"({2**62}, 0)"),
        FORM % ("'V2147483647'", "(1,)"),
        FORM % ("'|O'", "(2,)"),
        FORM % ("[('a', '<i4')]", "(4,)"),
        FORM % ("('<i4', (2147483647, 2147483647))", "(1,)"),
        " " * 60_000 + FORM % ("'<i4'", "(4,)"),
    ],
)
def test_headers_of_token_arrays_that_are_not_what_they_should_be(tmp_path, cache, header):
    for split in TEXTS:
        np.save(tmp_path / f"{split}.npy", np.arange(4, dtype=np.int32))
    (tmp_path / "valid.npy").write_bytes(npy(header))
    assert "valid.npy" in error_of("tokens", str(tmp_path), cache)


def test_pipes_and_devices_in_place_of_texts_and_arrays(tmp_path, cache):
    path = write(tmp_path / "d", "{}.txt")
    for split in TEXTS:
        np.save(tmp_path / "d" / f"{split}.npy", np.arange(4, dtype=np.int32))
    for name, kind in (("valid.txt", "wt103"), ("valid.npy", "tokens")):
        file = tmp_path / "d" / name
        file.unlink()
        os.mkfifo(file)
        assert "not a file" in error_of(kind, path, cache)
        file.unlink()
        file.symlink_to("/dev/zero")
        assert "not a file" in error_of(kind, path, cache)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, meta: {**meta, "tokens": {"train": meta["tokens"]["train"]}},
        lambda folder, meta: {**meta, "tokens": []},
        lambda folder, meta: {**meta, "tokens": dict.fromkeys(meta["tokens"])},
        lambda folder, meta: [meta],
        lambda folder, meta: None,
        lambda folder, meta: (folder / "vocabulary.txt").unlink() or meta,
        lambda folder, meta: [(folder / "train.npy").unlink(), os.mkfifo(folder / "train.npy")] and meta,
        lambda folder, meta: (folder / "train.npy").write_bytes(npy("(" * 5_000)) and meta,
        lambda folder, meta: np.save(folder / "train.npy", np.full(meta["tokens"]["train"], 99, np.int32)) or meta,
    ],
)
def test_a_spoiled_cache_is_written_again(tmp_path, cache, spoil):
    path = write(tmp_path / "d", "{}.txt")
    whole = load("wt103", path, cache).train.tolist()
    (folder,) = (tmp_path / "cache").iterdir()
    meta = spoil(folder, json.loads((folder / "meta.json").read_text()))
    (folder / "meta.json").write_text(json.dumps(meta))
    assert load("wt103", path, cache).train.tolist() == whole
    (folder / "meta.json").write_text("[" * 100_000)
    assert load("wt103", path, cache).train.tolist() == whole
    assert len(os.listdir(cache)) == 1


@pytest.mark.parametrize("how", ["bzip2", "lzma", "encrypted", "unknown", "bomb"])
def test_texts_in_zip_files_that_cannot_be_unpacked(tmp_path, cache, how):
    path = tmp_path / "x.zip"
    methods = {"bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
    with zipfile.ZipFile(path, "w", methods.get(how, zipfile.ZIP_DEFLATED)) as archive:
        for split, text in TEXTS.items():
            archive.writestr(f"wiki.{split}.tokens", b"a " * (36 << 20) if how == "bomb" and split == "test" else text)
    data = path.read_bytes()
    if how in ("encrypted", "unknown"):
        place, content = {"encrypted": (8, b"\x01"), "unknown": (10, b"\x63")}[how]
        parts = data.split(b"PK\x01\x02")
        path.write_bytes(
            b"PK\x01\x02".join([parts[0], *(part[: place - 4] + content + part[place - 3 :] for part in parts[1:])])
        )
    words = {"encrypted": "it is encrypted", "bomb": "bytes of content"}.get(how, "compressed by method")
    assert words in error_of("wt103", str(path), cache)


def test_a_text_of_ever_new_words_is_refused(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("deq_flax.data.text.vocabulary.MAX_WORDS", 1000)
    path = write(tmp_path / "d", "{}.txt", TEXTS | {"train": " ".join(map(str, range(1001))) + "\n"})
    assert "more than 1000 different words" in error_of("wt103", path, cache)
