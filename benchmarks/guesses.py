"""Several words of a greedy text at once: how many guessed words a pass keeps, and what it costs.

    python -m benchmarks.guesses DIR [DIR ...] [--words 2 4 8] [--write]

DIR is the workdir of a language model with an equilibrium; runs whose names differ in the number that they end in are seeds of
one model. A pass solves for W words as one segment: the next word, which is certain, and W - 1 guesses. It keeps the guesses
that the model itself chooses after the words before them, up to the first other one, so that the text is the greedy one.

- Own guesses are the choices of the pass before, beyond the words that it kept (Jacobi decoding, Santilli et al. 2023,
  arXiv:2305.10427).
- Repeated ones are the words that followed the last occurrence of the next word in the text so far.

Each text is written alone. The time of a pass is that of the processor, over that of a pass of one word.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import few_steps, tables, turns
from deq_flax.config import read_run_config
from deq_flax.equilibrium import Solver
from deq_flax.generate import default_memory
from deq_flax.models.generation import Generator, Sampling, solve
from deq_flax.nn.transformer import TransformerCell
from deq_flax.pretrained import load_model
from deq_flax.train.phases import make_phases

TIMED_PASSES, ROUNDS = 32, 15
"""Passes that are timed together, and how often; the fastest counts."""

Guess = Callable[[list[int], list[int]], list[int]]
"""(the text so far, the last pass's choices beyond it) -> guesses for the words after its last one."""


class Passes:
    """Passes of a model over several words.

    Args:
      model: an equilibrium language model, left unchanged.
      solver: solver of the equilibria.
      memory: number of tokens to remember; each word attends to so many before it, as when words are read one by one.
    """

    def __init__(self, model: Any, *, solver: Solver, memory: int):
        model = nnx.merge(*nnx.split(model))
        self.generator = Generator(model, solver=solver, sampling=Sampling(), memory=memory)
        model.options = replace(model.options, mem_len=memory)
        for _, module in list(nnx.iter_graph(model)):
            if isinstance(module, TransformerCell):
                span = min(memory + 1, module.options.local_size or memory + 1)
                module.options = replace(module.options, local_size=span)
        graphdef, self._params = nnx.split(model)
        self._read = jax.jit(partial(_read, graphdef, solver))

    def read(self, memory: Any, words_BW: Any) -> tuple[Any, jax.Array, jax.Array]:
        """Read words of which the first is certain: memory with those kept, their numbers (B,), all choices (B, W)."""
        return self._read(self._params, memory, words_BW)

    def write(self, prompt: np.ndarray, count: int, words: int, guess: Guess) -> tuple[list[int], float]:
        """The greedy continuation of a prompt by passes of `words`: its first `count` words, and how many a pass has kept."""
        state = self.generator.start([prompt])
        memory, text, beyond, passes = state.memory, [*map(int, prompt), int(state.token_B[0])], [], 0
        while len(text) < len(prompt) + count:
            guesses = [*guess(text, beyond), *[text[-1]] * words][: words - 1]
            memory, kept_B, chosen_BW = self.read(memory, np.array([[text[-1], *guesses]], np.int32))
            kept, chosen = int(kept_B[0]), np.asarray(chosen_BW[0]).tolist()
            text, beyond, passes = [*text, *chosen[:kept]], chosen[kept:], passes + 1
        return text[len(prompt) : len(prompt) + count], (len(text) - len(prompt) - 1) / passes

    def seconds(self, prompts: Sequence[np.ndarray], counts: Sequence[int]) -> list[float]:
        """Processor time of one pass of each number of words, for all texts together and whatever it keeps; they take turns."""
        memory = self.generator.start(prompts).memory
        words_of, fastest = [np.stack([prompt[:words] for prompt in prompts]) for words in counts], [math.inf] * len(counts)
        for _ in range(1 + ROUNDS):  # the first one compiles
            for i, words_BW in enumerate(words_of):
                start = process_time()
                for _ in range(TIMED_PASSES):
                    jax.block_until_ready(self.read(memory, words_BW))
                fastest[i] = min(fastest[i], (process_time() - start) / TIMED_PASSES)
        return fastest


def _read(
    graphdef: nnx.GraphDef[Any], solver: Solver, params: nnx.State, memory: Any, words_BW: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    model = nnx.merge(graphdef, params)
    equation, solution = solve(model, solver, words_BW, memory)
    chosen_BW = jnp.argmax(model.log_probabilities(solution.value), axis=-1).astype(jnp.int32)
    kept_B = 1 + jnp.cumprod(words_BW[:, 1:] == chosen_BW[:, :-1], axis=1).sum(1, dtype=jnp.int32)
    return model.next_memory(memory, equation, solution.value, kept_B), kept_B, chosen_BW


def own(_: list[int], beyond: list[int]) -> list[int]:
    """The choices of the pass before."""
    return beyond


def repeated(text: list[int], beyond: list[int]) -> list[int]:
    """The words that followed the last occurrence of the text's last word; none before: the choices of the pass before."""
    places = [i for i, word in enumerate(text[:-1]) if word == text[-1]]
    return text[places[-1] + 1 :] if places else beyond


def measure(name: str, workdirs: Sequence[Path], counts: Sequence[int]) -> list[list[str]]:
    """The rows of a model."""
    config = read_run_config(workdirs[0])
    solver = make_phases(config.deq).evaluation.solver
    assert solver is not None, f"{name} has no equilibrium"
    prompts, _ = few_steps.texts_to_write(config)
    seeds = [
        Passes(load_model(few_steps.last_checkpoint(workdir)).model, solver=solver, memory=default_memory(config))
        for workdir in workdirs
    ]
    times = [seeds[0].seconds(some, (1, *counts)) for some in (prompts[:1], prompts)]
    greedy = [[passes.write(prompt, few_steps.TOKENS, 1, own)[0] for prompt in prompts] for passes in seeds]
    rows = []
    for i, words in enumerate(counts, 1):
        cells, same = [], []
        for guess in (own, repeated):
            written = [[passes.write(prompt, few_steps.TOKENS, words, guess) for prompt in prompts] for passes in seeds]
            same += [np.mean(np.equal([text for text, _ in seed], texts)) for seed, texts in zip(written, greedy, strict=True)]
            cells.append(f"{mean(kept for seed in written for _, kept in seed):.3f}")
        ratios = [f"{seconds[i] / seconds[0]:.2f}" for seconds in times]
        rows.append([f"`{name}`", str(words), *cells, f"{mean(same):.1%}", *ratios])
        print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = tables.parser(__doc__, page=tables.LANGUAGE)
    parser.add_argument("workdirs", nargs="+", type=Path, help="of runs")
    parser.add_argument("--words", nargs="+", type=int, default=[2, 4, 8], help="words of a pass (2 4 8)")
    arguments = parser.parse_args()
    body = [row for name, dirs in few_steps.models(arguments.workdirs).items() for row in measure(name, dirs, arguments.words)]
    head = ["model", "words of a pass", "kept, own guesses", "kept, repeated", "words of the greedy text"]
    head += ["time of a pass, one text", f"{few_steps.TEXTS} texts"]
    what = f"{few_steps.TEXTS} texts of {few_steps.TOKENS} words; means of the seeds"
    tables.publish("guesses", f"{turns.machine(['jax'])}. {what}:\n\n{tables.markdown(head, body)}", arguments.write)


if __name__ == "__main__":
    main()
