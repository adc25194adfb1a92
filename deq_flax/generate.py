"""Write on from a prompt with a language model.

  python -m deq_flax.generate --checkpoint DIR --prompt "the value of the" [--tokens 100] [--temperature 0.8] [--top_p 0.9]

DIR is the workdir of a run or of `deq_flax.convert`. Words appear as they are chosen; speed, and evaluations per word, follow
on stderr. The same seed gives the same text. Words are separated by spaces, as in the text that the model was trained on.
"""

import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from deq_flax import cli
from deq_flax.data.text.corpus import load_text
from deq_flax.data.text.pydoc import tokenize
from deq_flax.data.text.vocabulary import EOS, UNK, Vocabulary
from deq_flax.errors import UserError

_FLAGS = flags.FlagValues()  # of its own, so that this module can be imported beside other commands
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a workdir, its checkpoints folder, or the folder of one step", flag_values=_FLAGS
)
_PROMPT = flags.DEFINE_string("prompt", None, "the beginning of the text; empty: the beginning of a line", flag_values=_FLAGS)
_TOKENS = flags.DEFINE_integer("tokens", 100, "how many words to write", flag_values=_FLAGS)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "0 always takes the likeliest word; 1 draws from the model's distribution", flag_values=_FLAGS
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "draw from so many of the likeliest words; 0: from all", flag_values=_FLAGS)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "draw from the likeliest words that together have this probability", flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "of the draws", flag_values=_FLAGS)
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "the model's words, one a line; default: those of its run or its text", flag_values=_FLAGS
)
_MEMORY = flags.DEFINE_integer("memory", None, "tokens remembered; default: as in training", flag_values=_FLAGS)
_MAX_STEPS = flags.DEFINE_integer(
    "max_steps", None, "limit on the evaluations per token; default: as in training", flag_values=_FLAGS
)
_TOL = flags.DEFINE_float("tol", None, "tolerance of a solve; default: as in training", flag_values=_FLAGS)

VOCABULARY_FILE = "vocabulary.txt"
"""Where a run keeps its words, in its workdir."""


def main() -> int:
    """The command."""
    # Imported late: a mistake in the command line should not have to wait for the libraries.
    from deq_flax.models.generation import Generator, Sampling
    from deq_flax.pretrained import load_model

    cli.require(_TOKENS.value >= 1, f"--tokens must be at least 1, not {_TOKENS.value}")
    try:
        sampling = Sampling(temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value)
        loaded = load_model(_CHECKPOINT.value or "")
        cli.require(loaded.config["task"] == "language", "--checkpoint: only a DEQ-Transformer writes")
        vocabulary = find_vocabulary(Path(_CHECKPOINT.value or ""), loaded.config, _VOCABULARY.value)
        ids = encode_prompt(_PROMPT.value or "", vocabulary, loaded.config["data"]["name"])
        memory = _MEMORY.value if _MEMORY.value is not None else default_memory(loaded.config)
        solver = make_solver(loaded.config["deq"], tol=_TOL.value, max_steps=_MAX_STEPS.value)
        generator = Generator(loaded.model, solver=solver, sampling=sampling, memory=memory, words=len(vocabulary))
    except ValueError as error:
        raise UserError(str(error)) from error
    print(vocabulary.decode(ids), end="", flush=True)
    _write(generator.tokens(ids, _TOKENS.value, _SEED.value), vocabulary, last=int(ids[-1]))
    return 0


def find_vocabulary(checkpoint: Path, config: Mapping[str, Any], file: str | None) -> Vocabulary:
    """The words of a model: from `file`, else as its run kept them, else those of the text it was trained on.

    Raises:
      UserError: they are not to be had, or are more than the model's.
    """
    if file is not None:
        vocabulary = Vocabulary.load(file)
    else:
        kept = [folder / VOCABULARY_FILE for folder in _workdirs(checkpoint.absolute())]
        kept = [path for path in kept if path.is_file()]
        vocabulary = Vocabulary.load(kept[0]) if kept else _words_of_text(config["data"])
    known = config["model"]["vocab_size"]
    if len(vocabulary) > known:
        raise UserError(f"the vocabulary has {len(vocabulary)} words, the model {known}: it is not this model's vocabulary")
    return vocabulary


def encode_prompt(prompt: str, vocabulary: Vocabulary, text: str) -> Any:
    """Ids of at least one token; words that the vocabulary does not have are named on stderr.

    Raises:
      UserError: a word is unknown, or there is none, and the vocabulary has nothing to stand for it.
    """
    if text == "pydoc":
        prompt = "\n".join(map(tokenize, prompt.split("\n")))
    words = (prompt.lower() if vocabulary.lower_case else prompt).replace("\n", f" {EOS} ").split()
    unknown = dict.fromkeys(word for word in words if word not in vocabulary)
    if unknown and UNK in vocabulary:
        print(f"warning: not in the vocabulary, read as {UNK}: {', '.join(unknown)}", file=sys.stderr)
    if not words and EOS not in vocabulary:
        raise UserError("--prompt is empty, and the vocabulary has no end of a line to begin from: give a word")
    return vocabulary.encode(prompt if words else "\n")


def default_memory(config: Mapping[str, Any]) -> int:
    """As many tokens as in training; for a model without memory, what a segment let it see."""
    return config["model"]["mem_len"] or config["data"]["eval_seq_len"]


def make_solver(deq: Mapping[str, Any], *, tol: float | None, max_steps: int | None) -> Any:
    """The forward solver of a config's section `deq`. ValueError: a number makes no sense."""
    from deq_flax.equilibrium import SOLVERS

    if deq["solver"] not in SOLVERS:
        raise UserError(f"unknown solver {deq['solver']!r}; known: {', '.join(SOLVERS)}")
    make: Any = SOLVERS[deq["solver"]]
    tol, max_steps = deq["tol"] if tol is None else tol, deq["max_steps"] if max_steps is None else max_steps
    return make(tol=tol, max_steps=max_steps, stop=deq["stop"])


def _workdirs(path: Path) -> list[Path]:
    """The folders that may be the workdir of a checkpoint named by `path`."""
    return [path, *(folder.parent for folder in (path, path.parent) if folder.name == "checkpoints")]


def _words_of_text(data: Mapping[str, Any]) -> Vocabulary:
    try:
        vocabulary = load_text(data["name"], data["path"], data["cache"]).vocabulary
        reason = "its text is token ids alone"
    except UserError as error:
        vocabulary, reason = None, str(error)
    if vocabulary is None:
        raise UserError(
            f"the words of this model are not known ({reason}): give --vocabulary FILE, one word a line, by their ids"
        )
    return vocabulary


def _write(tokens: Iterable[tuple[int, float]], vocabulary: Vocabulary, *, last: int) -> None:
    """Print words as they come, then how fast they came: the first, with its compilation, is not timed."""
    seen, evaluations, start = 0, 0.0, 0.0
    at_line_start = vocabulary.words[last] == EOS
    try:
        for token, nfe in tokens:
            word = vocabulary.words[token]
            print("\n" if word == EOS else word if at_line_start else f" {word}", end="", flush=True)
            at_line_start = word == EOS
            seen += 1
            if seen == 2:
                start = time.perf_counter()
            elif seen > 2:
                evaluations += nfe
        print(flush=True)
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if seen > 2:
        seconds = time.perf_counter() - start
        speed = f"{(seen - 2) / seconds:.1f} tokens/s, {evaluations / (seen - 2):.1f} evaluations per token"
        print(speed, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",), flag_values=_FLAGS)
