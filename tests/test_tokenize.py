"""The tokenize command: text files to a run that trains on subwords and generates text."""

import json

import numpy as np
import pytest

from deq_flax.data.text.corpus import TextOptions, load_text
from deq_flax.data.text.pydoc import pydoc_corpus
from deq_flax.data.text.tokenizer import END_OF_TEXT, Tokenizer
from deq_flax.errors import UserError
from tests.commands import command, commands

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Texts, the folder of their tokens, and the finished command."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "in").mkdir()
    texts = [pydoc_corpus()[0]["valid"], "last line without a break"]
    for name, text in zip("ab", texts, strict=True):
        (folder / "in" / name).write_text(text, encoding="utf-8")
    done = command("tokenize", "--input", folder / "in", "--vocab_size", 400, "--held_out", "0.2", folder / "out")
    assert done.returncode == 0, done.stderr
    return texts, folder / "out", done


@pytest.mark.slow
def test_the_splits_together_are_the_text(encoded):
    texts, out, _ = encoded
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    tokens = {split: np.load(out / f"{split}.npy") for split in SPLITS}
    assert all(ids.dtype == np.uint16 for ids in tokens.values())
    assert tokenizer.decode(np.concatenate([*tokens.values()])) == "".join(text + END_OF_TEXT for text in texts)
    meta = json.loads((out / "corpus.json").read_text())
    for split in SPLITS:
        size = len(tokenizer.decode(tokens[split]).replace(END_OF_TEXT, "").encode())
        assert meta["bytes"][split] == size and meta["tokens"][split] == len(tokens[split])
        share = size / sum(len(text.encode()) for text in texts)
        assert abs(share - (0.6 if split == "train" else 0.2)) < 0.02


def test_the_corpus_is_read_with_its_sizes(encoded, tmp_path):
    _, out, _ = encoded
    corpus = load_text(TextOptions(name="tokens", path=str(out)))
    meta = json.loads((out / "corpus.json").read_text())
    assert corpus.vocab_size == 400 and corpus.bytes_per_token("test") == meta["bytes"]["test"] / meta["tokens"]["test"]
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"the tokenizer .* is not UTF-8"):
        load_text(TextOptions(name="tokens", path=str(tmp_path)))
    np.save(tmp_path / "valid.npy", np.zeros(7, np.uint16))
    with pytest.raises(UserError, match=r"valid\.npy of \d+ tokens, which has 7"):
        load_text(TextOptions(name="tokens", path=str(tmp_path)))
    (tmp_path / "corpus.json").write_text('{"vocab_size": true}')
    with pytest.raises(UserError, match="is damaged"):
        load_text(TextOptions(name="tokens", path=str(tmp_path)))


@pytest.mark.slow
def test_a_run_on_subwords_reports_bits_per_byte_and_generates(encoded, tmp_path):
    _, out, _ = encoded
    sizes = {"d_model": 16, "d_embed": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "mem_len": 8, "cutoffs": "", "div_value": 1}
    changes = [f"--config.model.{key}={value}" for key, value in sizes.items()]
    changes += [
        "--config.train.steps=2",
        "--config.deq.pretrain_steps=0",
        "--config.data.seq_len=8",
        "--config.data.name=tokens",
    ]
    run = command("main", "--config", "configs/wt103.py:tiny", "--workdir", tmp_path, *changes, f"--config.data.path={out}")
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    valid = next(line for line in lines if line["split"] == "valid")
    per_token = load_text(TextOptions(name="tokens", path=str(out))).bytes_per_token("valid")
    np.testing.assert_allclose(valid["bits_per_byte"], valid["loss"] / np.log(2) / per_token, rtol=1e-6)
    assert (tmp_path / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    text = command("generate", "--checkpoint", tmp_path, "--prompt", "The value of ", "--tokens", 12)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("The value of ") and len(text.stdout) > len("The value of \n")
    empty = command("generate", "--checkpoint", tmp_path, "--tokens", 3, "--json")
    assert empty.returncode == 0, empty.stderr
    assert json.loads(empty.stdout)["prompt"] == "" and empty.stderr.startswith(json.loads(empty.stdout)["text"])


@pytest.mark.slow
def test_a_tokenizer_of_another_program_may_have_gaps_and_another_end_of_text(tmp_path):
    words = {"[UNK]": 0, "the": 1, "cat": 2, "</s>": 70_000}
    pieces = {
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }
    (tmp_path / "words.json").write_text(json.dumps({"version": "1.0", "added_tokens": []} | pieces))
    (tmp_path / "in").mkdir()
    for name, text in {"a": b"the cat\n" * 40, "b": b"the \xe9\n" * 40}.items():
        (tmp_path / "in" / name).write_bytes(text)
    given = ["--held_out", 0.1, "--tokenizer", tmp_path / "words.json", "--input"]
    cases = {
        "several": [*given, tmp_path / "in"],
        "named": ["--end_of_text", "</s>", *given, tmp_path / "in"],
        "alone": [*given, tmp_path / "in" / "a"],
        "trained": ["--end_of_text", "<end>", "--vocab_size", 258, "--input", tmp_path / "in"],
    }
    done = commands("tokenize", [[*arguments, tmp_path / name] for name, arguments in cases.items()])
    assert not any(one.returncode for one in done), done
    invalid = f"warning: {tmp_path / 'in' / 'b'}: 40 byte sequences are not UTF-8; they were read as U+FFFD\n"
    together = (
        f"warning: {tmp_path / 'words.json'} has no token <|endoftext|>, so the documents run together: name another with "
    )
    assert [one.stderr for one in done] == [f"{together}--end_of_text\n{invalid}", invalid, "", invalid]
    for name, ends in {"several": [], "named": [80, 161], "alone": []}.items():
        tokens = {split: np.load(tmp_path / name / f"{split}.npy") for split in SPLITS}
        assert np.flatnonzero(np.concatenate([*tokens.values()]) == 70_000).tolist() == ends, name
        meta = json.loads((tmp_path / name / "corpus.json").read_text())
        assert meta["vocab_size"] == 70_001 == load_text(TextOptions(name="tokens", path=str(tmp_path / name))).vocab_size
        assert sum(meta["bytes"].values()) == 40 * 8 + 40 * 6 * (name != "alone")
    assert Tokenizer.load(tmp_path / "trained" / "tokenizer.json").id_of("<end>") == 0
    assert (np.load(tmp_path / "trained" / "train.npy") == 0).sum() == 1


@pytest.mark.slow
def test_mistakes_are_one_line(encoded, tmp_path):
    _, out, _ = encoded
    (tmp_path / "text").write_text("a few words\n")
    words = tmp_path / "words.json"
    words.write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}'
    )
    text = ["--input", tmp_path / "text"]
    cases = {
        "exists: give a new folder": ["--input", out, out],
        "--input none does not exist": ["--input", "none", tmp_path / "new"],
        "--valid none does not exist": [*text, "--valid", "none", "--test", tmp_path / "text", tmp_path / "new"],
        "--input is empty": ["--input", "", tmp_path / "new"],
        "--end_of_text is empty": [*text, "--end_of_text", "", tmp_path / "new"],
        "has no token '</s>'": [*text, "--tokenizer", out / "tokenizer.json", "--end_of_text", "</s>", tmp_path / "new"],
        "cannot encode the text": [*text, "--tokenizer", words, tmp_path / "new"],
        "--input is missing": [tmp_path / "new"],
        "--held_out must be": [*text, "--held_out", "0.5", tmp_path / "new"],
        "give both": [*text, "--valid", tmp_path / "text", tmp_path / "new"],
        "the valid split has": [*text, tmp_path / "new"],
        "at least 257": [*text, "--vocab_size", 100, tmp_path / "new"],
        "is no tokenizer.json": [*text, "--tokenizer", tmp_path / "text", tmp_path / "new"],
    }
    for (message, _), done in zip(cases.items(), commands("tokenize", [*cases.values()]), strict=True):
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, (message, done.stderr)
    assert not (tmp_path / "new").exists() and sorted(file.name for file in tmp_path.iterdir()) == ["text", "words.json"]
