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


@pytest.mark.slow
def test_mistakes_are_one_line(encoded, tmp_path):
    _, out, _ = encoded
    (tmp_path / "text").write_text("a few words\n")
    text = ["--input", tmp_path / "text"]
    cases = {
        "exists: give a new folder": ["--input", out, out],
        "--input none does not exist": ["--input", "none", tmp_path / "new"],
        "--valid none does not exist": [*text, "--valid", "none", "--test", tmp_path / "text", tmp_path / "new"],
        "--input is empty": ["--input", "", tmp_path / "new"],
        "--input is missing": [tmp_path / "new"],
        "--held_out must be": [*text, "--held_out", "0.5", tmp_path / "new"],
        "give both": [*text, "--valid", tmp_path / "text", tmp_path / "new"],
        "the valid split has": [*text, tmp_path / "new"],
        "at least 257": [*text, "--vocab_size", 100, tmp_path / "new"],
        "is no tokenizer.json": [*text, "--tokenizer", tmp_path / "text", tmp_path / "new"],
    }
    for (message, _), done in zip(cases.items(), commands("tokenize", [*cases.values()]), strict=True):
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, (message, done.stderr)
    assert not (tmp_path / "new").exists() and [file.name for file in tmp_path.iterdir()] == ["text"]
