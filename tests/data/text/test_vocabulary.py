"""Words keep the order and the ids of the original vocabularies."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deq_flax.data.text.corpus import TextOptions, load_text
from deq_flax.data.text.vocabulary import Vocabulary, count_words
from deq_flax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
REAL_DATA = Path(os.environ.get("DEQ_FLAX_DATA", "no data here"))
REFERENCE = json.loads((REPOSITORY / "tests/data/reference/vocabulary.json").read_text())


def vocabulary_of(text, **options):
    return Vocabulary.from_counts(count_words([text], **options), **options)


def test_words_are_sorted_by_count_then_first_appearance():
    assert vocabulary_of("b a c a d c\n").words == ("<eos>", "a", "c", "b", "d")


def test_counts_do_not_depend_on_how_the_text_is_cut():
    whole = count_words(["x y z y\nz y x w"])
    pieces = count_words(["x y ", "z y\n", "z ", "y x w"])
    assert whole.most_common() == pieces.most_common()


def test_every_line_blank_ones_too_ends_with_eos():
    vocabulary = vocabulary_of("a b\n")
    assert vocabulary.encode(" a b \n\n b\n").tolist() == [1, 2, 0, 0, 2, 0]
    assert vocabulary.encode("a b").tolist() == [1, 2]


def test_eos_in_the_text_is_the_symbol_itself():
    vocabulary = vocabulary_of("a <eos> <eos> a a\n")
    assert vocabulary.words == ("<eos>", "a")
    assert vocabulary.encode("a <eos>").tolist() == [1, 0]


def test_case_is_kept_or_lowered():
    assert vocabulary_of("The the", lower_case=False).words == ("<eos>", "The", "the")
    lowered = vocabulary_of("The the THE", lower_case=True)
    assert lowered.words == ("<eos>", "the")
    assert lowered.encode("tHE").tolist() == [1]


def test_an_unknown_word_is_unk_or_a_clear_error():
    assert vocabulary_of("a <unk> a").encode("b a").tolist() == [2, 1]
    with pytest.raises(UserError, match="'b' is not in the vocabulary"):
        vocabulary_of("a").encode("b a")


def test_decode_inverts_encode():
    vocabulary = vocabulary_of("one two three <unk>\n")
    for text in ("one two\n", "\n\none\n two three", "", "three"):
        ids = vocabulary.encode(text)
        np.testing.assert_array_equal(vocabulary.encode(vocabulary.decode(ids)), ids)
    for ids in ([-1], [len(vocabulary)]):
        with pytest.raises(IndexError, match="ids must be"):
            vocabulary.decode(ids)


@settings(deadline=None)
@given(lines=st.lists(st.lists(st.sampled_from(["a", "é", "<unk>", "東京"]), max_size=3).map(" ".join), min_size=1, max_size=6))
def test_bytes_are_those_of_the_words_with_one_separator_each(lines):
    text = "a" + "".join(f"{line}\n" for line in ["", *lines])
    vocabulary = vocabulary_of("a é <unk> 東京 <eos>")
    ids = vocabulary.encode(text)
    assert vocabulary.count_bytes(ids) == len(text.encode())
    assert vocabulary.count_bytes(ids[:1]) + vocabulary.count_bytes(ids[1:]) == len(text.encode())


def test_bytes_of_words_without_lines_end_with_a_space_each():
    vocabulary = Vocabulary(["a", "é"])
    assert vocabulary.count_bytes(vocabulary.encode("a é a")) == len("a é a ".encode())


@pytest.mark.parametrize(("text", "lower_case"), [("Ünder the\u2028 <unk> 東京", False), ("ünder the", True)])
def test_a_saved_vocabulary_is_read_back(tmp_path, text, lower_case):
    vocabulary = vocabulary_of(text)
    vocabulary.save(tmp_path / "v.txt")
    loaded = Vocabulary.load(tmp_path / "v.txt")
    assert loaded.words == vocabulary.words
    assert loaded.lower_case == lower_case


@pytest.mark.parametrize("content", [b"", b"a\n\nb\n", b"a\na\n", b"\xff\n", None])
def test_a_bad_vocabulary_file_is_named(tmp_path, content):
    path = tmp_path / "v.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"v\.txt"):
        Vocabulary.load(path)


def check_reference(reference, corpus):
    words = corpus.vocabulary.words
    assert corpus.vocab_size == reference["vocab_size"] == len(words)
    assert list(words[: len(reference["first_symbols"])]) == reference["first_symbols"]
    assert list(words[-len(reference["last_symbols"]) :]) == reference["last_symbols"]
    assert hashlib.sha256("\n".join(words).encode()).hexdigest() == reference["vocab_sha256_newline_joined"]
    for split in reference.keys() & {"train", "valid", "test"}:
        tokens = np.asarray(corpus.split(split), "<i4")
        assert len(tokens) == reference[split]["tokens"]
        assert tokens[:10].tolist() == reference[split]["head"]
        assert hashlib.sha256(tokens.tobytes()).hexdigest() == reference[split]["sha256_little_endian_int32"]


@pytest.mark.skipif(not (REAL_DATA / "ptb").is_dir(), reason="no Penn Treebank here")
def test_penn_treebank_is_encoded_as_in_the_original(tmp_path):
    check_reference(REFERENCE["ptb"], load_text(TextOptions(name="ptb", path=str(REAL_DATA / "ptb"), cache=str(tmp_path))))


@pytest.mark.skipif(not (REAL_DATA / "wikitext-2-valid-test").is_dir(), reason="no WikiText here")
def test_wikitext_is_encoded_as_in_the_original(tmp_path):
    text = (REAL_DATA / "wikitext-2-valid-test" / "valid.txt").read_text(encoding="utf-8")
    head = "".join(text.splitlines(keepends=True)[:300])
    for split, content in (("train", text), ("valid", head), ("test", head)):
        (tmp_path / f"{split}.txt").write_text(content, encoding="utf-8")
    check_reference(REFERENCE["wt103"], load_text(TextOptions(name="wt103", path=str(tmp_path), cache=str(tmp_path / "cache"))))
