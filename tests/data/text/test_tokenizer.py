"""Subword tokens: every text comes back exactly, however it is cut; files of any kind are read as a stream."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deq_flax.data.text import documents
from deq_flax.data.text.documents import Documents
from deq_flax.data.text.tokenizer import END_OF_TEXT, Tokenizer
from deq_flax.errors import UserError

TEXT = "the cat sat on the mat, the dog sat on the log\n" * 40 + "naïve 日本語 🎉\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 300)


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    text_of = tokenizer.stream([])
    assert "".join(map(text_of, ids)) == text


def test_frequent_words_are_one_token(tokenizer):
    assert 257 < len(tokenizer) <= 300 and tokenizer.id_of(END_OF_TEXT) == 0
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    many = tokenizer.encode_many([TEXT, "the log"])
    assert many[0].tolist() == tokenizer.encode(TEXT).tolist() and tokenizer.decode(many[1]) == "the log"


def test_a_character_of_several_tokens_is_shown_once_it_is_complete(tokenizer):
    ids = tokenizer.encode("é🎵")
    shown = [*map(tokenizer.stream(tokenizer.encode("the")), ids)]
    assert "".join(shown) == "é🎵" and shown.count("") == len(ids) - 2


def test_a_tokenizer_file_is_read_back(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    for content, message in [(b"{}", "is no tokenizer.json"), (b"\xff", "not UTF-8"), (None, "cannot read")]:
        file = tmp_path / "bad.json"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Tokenizer.load(file)
    with pytest.raises(UserError, match="at least 257"):
        Tokenizer.train([TEXT], 256)


def test_a_text_that_contains_a_special_token_ends_no_document(tokenizer):
    text = f"the cat{END_OF_TEXT}the dog"
    for ids in (tokenizer.encode(text), *tokenizer.encode_many([text])):
        assert len(ids) and 0 not in ids
        assert tokenizer.decode(ids) == text


WORDS = {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}


def word_level(vocab, **parts):
    """A tokenizer of whole words, as another program may have written it."""
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    return Tokenizer.from_json(json.dumps(WORDS | {"model": model} | parts), "words.json")


def test_a_text_that_a_tokenizer_cannot_encode_is_an_error_of_one_line():
    words = word_level({"the": 0, "cat": 1})
    assert words.encode("the cat").tolist() == [0, 1]
    for encode in (words.encode, lambda text: words.encode_many([text]), lambda text: words.encode("\ud800")):
        with pytest.raises(UserError, match=r"cannot encode the text \(.*\): use one that covers any text") as caught:
            encode("the dog")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot encode the text"):
        word_level({"the": 1 << 31}).encode("the")


def test_ids_may_have_gaps():
    assert len(word_level({"[UNK]": 0, "the": 3, "cat": 700})) == 701
    assert len(word_level({})) == 0


@pytest.mark.parametrize("piece", [16, 64, 1 << 16])
def test_pieces_are_the_text(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(documents, "PIECE_BYTES", piece)
    texts = {
        "a.txt": "one\ntwo 🎉\n" * 9,
        "sub/b": "é" * 50,
        "sub/c.md": "",
        "d": f"no line break {END_OF_TEXT}",
        ".hidden": "x",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    found = Documents.find([str(tmp_path)])
    assert [str(file.relative_to(tmp_path)) for file in found.files] == ["a.txt", "d", "sub/b"]
    pieces = [*found.pieces()]
    assert sum(piece.ends for piece in pieces) == 3 and not found.invalid
    assert "".join(piece.text for piece in pieces) == texts["a.txt"] + texts["d"] + texts["sub/b"]
    assert sum(piece.size for piece in pieces) == found.size()


def test_what_is_not_utf_8_is_counted_and_replaced(tmp_path):
    (tmp_path / "bad").write_bytes(b"abc \xff\xfe def \xef\xbf\xbd\n")
    (tmp_path / "good").write_bytes(b"fine\n")
    found = Documents.find([str(tmp_path / "bad"), str(tmp_path / "good")])
    for _ in range(2):
        pieces = [*found.pieces()]
        assert "".join(piece.text for piece in pieces) == "abc \ufffd\ufffd def \ufffd\nfine\n"
        assert [piece.size for piece in pieces] == [15, 5] and found.invalid == {tmp_path / "bad": 2}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("piece", [64, 1 << 16])
def test_parts_have_the_shares_of_the_file_whatever_its_encoding(tmp_path, monkeypatch, encoding, piece):
    """Bounds are bytes of the files; a byte that is no UTF-8 takes three as U+FFFD."""
    monkeypatch.setattr(documents, "PIECE_BYTES", piece)
    (tmp_path / "text").write_bytes("é là-bas\nà côté\n".encode(encoding) * 500)
    whole = Documents.find([str(tmp_path / "text")])
    size = (tmp_path / "text").stat().st_size
    bounds = [0, 0.4, 0.8 * size, 0.9 * size, math.inf]
    parts = [whole.part(*bounds[i : i + 2]) for i in range(4)]
    pieces = [[*part.pieces()] for part in parts]
    assert "".join(piece.text for part in pieces for piece in part) == "".join(piece.text for piece in whole.pieces())
    sizes = [sum(piece.size for piece in part) for part in pieces]
    assert sum(sizes) == size and max(abs(n - share * size) for n, share in zip(sizes, (0, 0.8, 0.1, 0.1), strict=True)) < 40
    assert [abs(part.size() - n) < 40 for part, n in zip(parts, sizes, strict=True)] == [True] * 4
    assert [piece.ends for piece in pieces[-1]][-1] and sum(piece.ends for part in pieces for piece in part) == 1
    assert sum(sum(part.invalid.values()) for part in parts) == (0 if encoding == "utf-8" else 5 * 500)


def test_places_without_text_are_refused(tmp_path):
    for place, option, message in [
        (tmp_path / "none", "--valid", "--valid .*none does not exist"),
        (tmp_path, "--input", "--input: no text in"),
        ("", "--test", "--test is empty: give a file"),
    ]:
        with pytest.raises(UserError, match=message):
            Documents.find([str(place)], option)
