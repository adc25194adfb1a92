"""Generate text from a prompt with a language model.

  python -m deq_flax.generate --checkpoint DIR --prompt "the value of the" [--tokens 100] [--temperature 0.8] [--top_p 0.9]
  python -m deq_flax.generate --checkpoint DIR --prompts FILE [--samples 4]     texts for every line of FILE, all together
  python -m deq_flax.generate --checkpoint DIR --config.data.path=PATH    a text that has moved, for its vocabulary

DIR is the workdir of a run or of `deq_flax.convert`. A single text is printed as it is chosen (`--nostream`: when it is done),
several when they are done, each after its number; then the speed, and the evaluations of f per token, on stderr. The same seed
gives the same text, and text i of several is that of its prompt alone with a seed higher by i. Where the model's tokens are
words, they are separated by spaces, as in the training text.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from deq_flax import cli
from deq_flax.config import Config
from deq_flax.config_files import checkpoint_config
from deq_flax.data.text.corpus import TextOptions, load_text
from deq_flax.data.text.pydoc import tokenize
from deq_flax.data.text.tokenizer import END_OF_TEXT, TOKENIZER_FILE, Tokenizer
from deq_flax.data.text.vocabulary import EOS, UNK, VOCABULARY_FILE, Vocabulary
from deq_flax.equilibrium import Solver
from deq_flax.errors import UserError
from deq_flax.models.generation import Generator, Sampling
from deq_flax.pretrained import load_model
from deq_flax.train.phases import DEQOptions, make_phases

_FLAGS = flags.FlagValues()  # not the global ones, so that this module can be imported beside other commands
_CONFIG = cli.config_flag(_FLAGS)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a workdir, its checkpoints folder, or the folder of one step", flag_values=_FLAGS
)
_PROMPT = flags.DEFINE_string("prompt", None, "the beginning of the text; empty: the beginning of a line", flag_values=_FLAGS)
_PROMPTS = flags.DEFINE_string("prompts", None, "a file with a prompt on each line, instead of --prompt", flag_values=_FLAGS)
_SAMPLES = flags.DEFINE_integer("samples", 1, "number of texts for each prompt", flag_values=_FLAGS)
_STREAM = flags.DEFINE_boolean("stream", True, "print a single text as it is chosen, not when it is done", flag_values=_FLAGS)
_TOKENS = flags.DEFINE_integer("tokens", 100, "number of tokens to generate", flag_values=_FLAGS)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "0: always the most likely word; 1: draw from the model's distribution", flag_values=_FLAGS
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw from this number of the most likely words; 0: from all", flag_values=_FLAGS)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "draw from the most likely words that together have this probability", flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the draws", flag_values=_FLAGS)
_VOCABULARY = flags.DEFINE_string(
    "vocabulary",
    None,
    "file of the model's vocabulary, one word a line, or its tokenizer.json; default: that of its run or its text",
    flag_values=_FLAGS,
)
_END_OF_TEXT = flags.DEFINE_string(
    "end_of_text", END_OF_TEXT, "token of a tokenizer that an empty prompt follows", flag_values=_FLAGS
)
_MEMORY = flags.DEFINE_integer("memory", None, "number of tokens in memory; default: as in training", flag_values=_FLAGS)
_MAX_STEPS = flags.DEFINE_integer(
    "max_steps", None, "limit on the evaluations of f per token; default: as in training", flag_values=_FLAGS
)
_TOL = flags.DEFINE_float("tol", None, "tolerance of the solver; default: as in training", flag_values=_FLAGS)


def main() -> dict[str, Any]:
    """Run the command; returns its result."""
    cli.require(_TOKENS.value >= 1, f"--tokens must be at least 1, not {_TOKENS.value}")
    cli.require(_SAMPLES.value >= 1, f"--samples must be at least 1, not {_SAMPLES.value}")
    cli.require(_PROMPT.value is None or _PROMPTS.value is None, "--prompt and --prompts exclude each other")
    given = [_PROMPT.value or ""] if _PROMPTS.value is None else read_prompts(Path(_PROMPTS.value))
    several = len(given) * _SAMPLES.value > 1
    streamed = _STREAM.value and not several
    cli.require(not (several and _STREAM.value and _FLAGS["stream"].present), "--stream is for a single text: leave it out")
    try:
        sampling = Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)
        loaded = load_model(_CHECKPOINT.value or "", cli.resolved(_FLAGS))
        cli.require(
            loaded.model.kind == "language" and loaded.model.has_equilibrium,
            f"--checkpoint: model {loaded.config.model.name!r} cannot generate text; an equilibrium language model is needed",
        )
        vocabulary = find_vocabulary(Path(_CHECKPOINT.value or ""), loaded.config, _VOCABULARY.value)
        encoded = [encode_prompt(prompt, vocabulary, loaded.config.data.name, _END_OF_TEXT.value) for prompt in given]
        prompts = [ids for ids in encoded for _ in range(_SAMPLES.value)]
        memory = _MEMORY.value if _MEMORY.value is not None else default_memory(loaded.config)
        solver = make_solver(loaded.config.deq, tol=_TOL.value, max_steps=_MAX_STEPS.value)
        generator = Generator(loaded.model, solver=solver, sampling=sampling, memory=memory, words=len(vocabulary))
    except ValueError as error:
        raise UserError(str(error)) from error
    # The token that stands for an empty prompt is no part of the text.
    shown = [vocabulary.decode(ids) if prompt.strip() else prompt for prompt, ids in zip(given, encoded, strict=True)]
    beginnings = [beginning for beginning in shown for _ in range(_SAMPLES.value)]
    tokens = generator.tokens(prompts, _TOKENS.value, _SEED.value)
    print(beginnings[0] if streamed else "", end="", flush=True)
    written = _write(tokens, [*map(vocabulary.stream, prompts)], streamed)
    texts = written.pop("texts")
    if not streamed:
        for number, (beginning, text) in enumerate(zip(beginnings, texts, strict=True)):
            print(f"{f'[{number}] ' if several else ''}{beginning}{text}", flush=True)
    if _PROMPTS.value is None and _SAMPLES.value == 1:
        return {"prompt": beginnings[0], "text": texts[0]} | written
    return {"texts": [{"prompt": a, "text": b} for a, b in zip(beginnings, texts, strict=True)]} | written


def read_prompts(file: Path) -> list[str]:
    """The lines of a file, at least one. UserError: it cannot be read, or is empty."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise UserError(f"--prompts: {file} is empty: write a prompt on each line")
    return lines


def find_vocabulary(checkpoint: Path, config: Config, file: str | None) -> Vocabulary | Tokenizer:
    """The vocabulary of a model: read from `file` if given, else from the workdir of its run, else from its training text.

    A file that ends in `.json` is a tokenizer.

    Raises:
      UserError: there is none, or it is larger than the model's.
    """
    names = (VOCABULARY_FILE, TOKENIZER_FILE)
    kept = [folder / name for folder in _workdirs(checkpoint.absolute()) for name in names]
    found = Path(file) if file is not None else next((path for path in kept if path.is_file()), None)
    vocabulary = _vocabulary_of_text(config.data) if found is None else _load_vocabulary(found)
    known = config.model.vocab_size
    if len(vocabulary) > known:
        raise UserError(f"the vocabulary has {len(vocabulary)} ids, the model {known}: it is not this model's vocabulary")
    return vocabulary


def _load_vocabulary(file: Path) -> Vocabulary | Tokenizer:
    return Tokenizer.load(file) if file.suffix == ".json" else Vocabulary.load(file)


def encode_prompt(prompt: str, vocabulary: Vocabulary | Tokenizer, text: str, end_of_text: str = END_OF_TEXT) -> np.ndarray:
    """The ids of a prompt, (n,) int32, n >= 1. Unknown words are listed on stderr.

    Args:
      prompt: words separated by spaces, or any text for a tokenizer; '' stands for the beginning of a line or document.
      vocabulary: the vocabulary of the model.
      text: name of the training text, which decides how the prompt is split into words.
      end_of_text: the token of a tokenizer that comes before a document.

    Raises:
      UserError: a word is unknown and the vocabulary has no '<unk>', or the prompt is empty and it has no '<eos>'; or the
        tokenizer cannot encode the prompt, or has no such token.
    """
    if isinstance(vocabulary, Tokenizer):
        ids = vocabulary.encode(prompt)
        if len(ids):
            return ids
        end = vocabulary.id_of(end_of_text)
        if end is None:
            raise UserError(
                f"--prompt is empty, and the tokenizer has no {end_of_text} to begin from: give a word, or name the token that "
                "ends a document with --end_of_text"
            )
        return np.array([end], np.int32)
    if text == "pydoc":
        prompt = "\n".join(map(tokenize, prompt.split("\n")))
    words = (prompt.lower() if vocabulary.lower_case else prompt).replace("\n", f" {EOS} ").split()
    unknown = dict.fromkeys(word for word in words if word not in vocabulary)
    if unknown and UNK in vocabulary:
        print(f"warning: not in the vocabulary, read as {UNK}: {', '.join(unknown)}", file=sys.stderr)
    if not words and EOS not in vocabulary:
        raise UserError("--prompt is empty, and the vocabulary has no end of a line to begin from: give a word")
    return vocabulary.encode(prompt if words else "\n")


def default_memory(config: Config) -> int:
    """The memory length of training, in tokens; for a model without memory, the length of an evaluation segment."""
    return config.model.mem_len or config.data.eval_seq_len


def make_solver(deq: DEQOptions | None, *, tol: float | None, max_steps: int | None) -> Solver:
    """The solver of evaluation, with another tolerance or limit if given. ValueError: one of these is out of range."""

    solver = make_phases(deq, seed=0).evaluation.solver
    assert solver is not None, "a model with an equilibrium has a solver"
    return solver.with_limits(tol=tol, max_steps=max_steps)


def _workdirs(path: Path) -> list[Path]:
    """The folders that may be the workdir of the checkpoint at `path`."""
    return [path, *(folder.parent for folder in (path, path.parent) if folder.name == "checkpoints")]


def _vocabulary_of_text(data: TextOptions) -> Vocabulary | Tokenizer:
    try:
        corpus = load_text(data)
        if corpus.tokenizer_json is not None:
            return Tokenizer.from_json(corpus.tokenizer_json, Path(data.path) / TOKENIZER_FILE)
        vocabulary, reason = corpus.vocabulary, "its text is token ids alone"
    except UserError as error:
        vocabulary, reason = None, str(error)
    if vocabulary is None:
        raise UserError(
            f"the words of this model are not known ({reason}): give --vocabulary FILE, one word a line, by their ids"
        )
    return vocabulary


def _write(
    tokens: Iterable[tuple[Sequence[int] | np.ndarray, float]], texts_of: Sequence[Callable[[int], str]], streamed: bool
) -> dict[str, Any]:
    """Collect texts, print the only one as it is generated if `streamed`, then the speed; returns texts and speed.

    The first tokens, with compilation, are not timed.
    """
    texts, seen, evaluations, start = [""] * len(texts_of), 0, 0.0, 0.0
    try:
        for token_B, nfe in tokens:
            for i, text_of in enumerate(texts_of):
                shown = text_of(int(token_B[i]))
                texts[i] += shown
                if streamed:
                    print(shown, end="", flush=True)
            seen += 1
            if seen == 2:
                start = time.perf_counter()
            elif seen > 2:
                evaluations += nfe
        if streamed:
            print(flush=True)
    except BrokenPipeError:  # the reader of a pipe has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    result: dict[str, Any] = {"texts": texts, "tokens": seen}
    if seen > 2:
        rate = (seen - 2) * len(texts) / (time.perf_counter() - start)
        spent = evaluations / (seen - 2)
        print(f"{rate:.1f} tokens/s, {spent:.1f} evaluations per token", file=sys.stderr)
        result |= {"tokens_per_second": rate, "evaluations_per_token": spent}
    return result


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",), of_run=("checkpoint", checkpoint_config), flag_values=_FLAGS)
