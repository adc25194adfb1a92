"""The generate command."""

import dataclasses

import pytest

from deq_flax.convert import convert
from deq_flax.data.text.corpus import TextOptions, load_text
from deq_flax.data.text.tokenizer import Tokenizer
from deq_flax.data.text.vocabulary import Vocabulary
from deq_flax.equilibrium import Anderson
from deq_flax.errors import UserError
from deq_flax.generate import _write, default_memory, encode_prompt, find_vocabulary, make_solver, read_prompts
from tests import reference
from tests.commands import command, commands
from tests.test_configs import resolved

VOCABULARY = Vocabulary(["<eos>", "<unk>", "the", "cat"], lower_case=True)


def config(text="tokens", vocab_size=4, mem_len=7):
    base = resolved("wt103", "base")
    data = dataclasses.replace(base.data, name=text, path="", eval_seq_len=9)
    return dataclasses.replace(base, data=data, model=dataclasses.replace(base.model, vocab_size=vocab_size, mem_len=mem_len))


def test_the_vocabulary_of_a_run_is_found_from_each_of_its_folders(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "12"
    step.mkdir(parents=True)
    VOCABULARY.save(tmp_path / "run" / "vocabulary.txt")
    for path in (step.parent.parent, step.parent, step):
        assert find_vocabulary(path, config(), None).words == VOCABULARY.words
    assert (
        find_vocabulary(tmp_path, config("pydoc", 10**6), None).words == load_text(TextOptions(name="pydoc")).vocabulary.words
    )
    Vocabulary(["a", "b"]).save(tmp_path / "other.txt")
    assert find_vocabulary(step, config(), str(tmp_path / "other.txt")).words == ("a", "b")


def test_a_missing_vocabulary_is_an_error_that_names_the_remedy(tmp_path):
    for text, message in [("tokens", "data.path is not set"), ("wt103", "data.path is not set"), ("pydoc", "not this model's")]:
        with pytest.raises(UserError, match=message):
            find_vocabulary(tmp_path, config(text), None)
    with pytest.raises(UserError, match="give --vocabulary FILE"):
        find_vocabulary(tmp_path, config("wt103"), None)


def test_unknown_words_are_named(capsys):
    assert encode_prompt("The dog and\nthe dog", VOCABULARY, "tokens").tolist() == [2, 1, 1, 0, 2, 1]
    assert capsys.readouterr().err == "warning: not in the vocabulary, read as <unk>: dog, and\n"
    with pytest.raises(UserError, match="the word 'dog' is not in the vocabulary"):
        encode_prompt("dog", Vocabulary(["the"]), "tokens")


def test_prompts_are_split_into_words_like_their_text(capsys):
    assert encode_prompt("The cat,\nthe cat", VOCABULARY, "pydoc").tolist() == [2, 3, 1, 0, 2, 3]
    assert encode_prompt("The cat,", VOCABULARY, "tokens").tolist() == [2, 1]


def test_an_empty_prompt_is_the_beginning_of_a_line():
    assert encode_prompt("  ", VOCABULARY, "tokens").tolist() == [0]
    with pytest.raises(UserError, match="--prompt is empty"):
        encode_prompt("", Vocabulary(["the"]), "tokens")


def test_an_empty_prompt_is_the_beginning_of_a_document_of_subwords():
    tokenizer = Tokenizer.train(["the cat"], 300, "</s>")
    assert encode_prompt("", tokenizer, "tokens", "</s>").tolist() == [0]
    assert 0 not in encode_prompt("the</s>", tokenizer, "tokens", "</s>")
    with pytest.raises(UserError, match=r"no <\|endoftext\|> to begin from: .* --end_of_text"):
        encode_prompt("", tokenizer, "tokens")


def test_memory_and_solver_are_those_of_training():
    assert default_memory(config()) == 7
    assert default_memory(config(mem_len=0)) == 9
    deq = resolved("wt103", "base").deq
    assert make_solver(deq, tol=None, max_steps=None).max_steps == 30
    changed = make_solver(deq, tol=1e-5, max_steps=4)
    assert (changed.tol, changed.max_steps) == (1e-5, 4)
    with pytest.raises(ValueError, match="max_steps"):
        make_solver(deq, tol=None, max_steps=0)


def test_the_solver_keeps_the_options_that_only_it_has():
    deq = resolved("wt103", "base").deq
    deq = dataclasses.replace(deq, solver="anderson", stop="absolute", solver_options={"memory": 3})
    solver = make_solver(deq, tol=1e-5, max_steps=None)
    assert solver == Anderson(tol=1e-5, max_steps=deq.max_steps, stop="absolute", memory=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "dir"
    config = resolved("wt103", "base")
    config = dataclasses.replace(config, deq=dataclasses.replace(config.deq, solver="picard"))
    convert(reference.FOLDER / "lm_deq_nocut.pth", folder, config, auto=True)
    Vocabulary(["<eos>", "<unk>", *(f"w{i}" for i in range(998))]).save(folder / "words.txt")
    return folder


@pytest.mark.slow
def test_the_command(checkpoint):
    arguments = ["--checkpoint", str(checkpoint), "--vocabulary", str(checkpoint / "words.txt"), "--prompt", "w5 w7 dog"]
    options = ["--tokens=12", "--temperature=0.8", "--top_k=20", "--top_p=0.9", "--seed=3", "--memory=20"]
    done = command("generate", *arguments, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w5 w7 <unk>")
    assert len(done.stdout.replace("\n", " <eos> ").split()) == 3 + 12 + 1
    warning, speed = done.stderr.splitlines()
    assert "read as <unk>: dog" in warning and "tokens/s" in speed and "evaluations per token" in speed


def test_the_result_is_the_text_that_was_printed_and_its_speed(capsys):
    tokens = [([0], 9.0), ([1], 9.0), ([2], 4.0), ([1], 5.0)]
    result = _write(iter(tokens), [["a ", "b", "\n"].__getitem__], True)
    assert result["texts"] == ["a b\nb"] and capsys.readouterr().out == "a b\nb\n"
    assert result["tokens"] == 4 and result["evaluations_per_token"] == 4.5 and result["tokens_per_second"] > 0


def test_several_texts_are_printed_when_they_are_done(capsys):
    pair = _write(iter([([0, 1], 3.0), ([1, 0], 3.0), ([0, 0], 3.0)]), [["a", "b"].__getitem__, ["c", "d"].__getitem__], False)
    assert pair["texts"] == ["aba", "dcc"] and pair["tokens"] == 3 and capsys.readouterr().out == ""


def test_prompts_are_the_lines_of_a_file(tmp_path):
    (tmp_path / "a").write_text("the cat\n\nthe")
    assert read_prompts(tmp_path / "a") == ["the cat", "", "the"]
    (tmp_path / "a").write_text("")
    for file, message in ((tmp_path / "a", "is empty"), (tmp_path / "b", "No such file")):
        with pytest.raises(UserError, match=f"--prompts: .*{message}"):
            read_prompts(file)


def test_mistakes_are_one_line(checkpoint, tmp_path):
    lines = tmp_path / "lines"
    lines.write_text("the\ncat\n")
    cases = {
        "give --vocabulary FILE": ["--prompt", "the"],
        "--stream is for a single text": ["--stream", "--prompts", lines],
        "--stream is for a single text: leave it out": ["--samples", 2, "--stream"],
    }
    done = commands("generate", [["--checkpoint", checkpoint, *arguments] for arguments in cases.values()])
    for message, one in zip(cases, done, strict=True):
        assert one.returncode == 2 and message in one.stderr and one.stderr.count("\n") == 1, one.stderr
