"""A trained language model with fewer evaluations than its solver asks for: perplexity, and generation.

    pip install -r requirements.txt -r requirements-plot.txt
    python -m benchmarks.few_steps DIR [DIR ...] [--evaluations 0 1 2 4 8 16] [--limits 1 2 4 8] [--draw FILE] [--write]

DIR is the workdir of a run, whose last checkpoint is taken; a table has a row for each model with an equilibrium, such as one
before and after training with the consistency loss. Runs whose names differ in the number that they end in, `NAME_0` and
`NAME_1`, are seeds of one model, and the numbers are their means. The figure has perplexity against minutes of training, and
against evaluations; a bar spans the seeds.

- Perplexity on the validation text after exactly so many evaluations of plain iteration, z <- f(z), from the initial guess, and
  the share of sequences whose residual is then below the tolerance. The last columns are those of the run's own solver.
- Greedy generation, with a limit on the evaluations of every solve. Evaluations of one text at a time, given the words of the
  solve to 1e-5, and given those of the validation text; the share of words that are those of the solve to 1e-5 given the same
  words before; and the speed, of the first seed. At the largest limit again with cold starts, if the model has warm ones: each
  solve from zero, not from the state of the remembered word with the nearest input.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import tables, turns
from benchmarks.language import curves, read
from deq_flax.checkpoints.stored_step import steps_in
from deq_flax.config import Config, make_task, read_run_config
from deq_flax.equilibrium import Picard, Solver, fixed_point
from deq_flax.generate import default_memory
from deq_flax.models import generation as library
from deq_flax.models.generation import Generator, Sampling
from deq_flax.nn.transformer import Memory
from deq_flax.pretrained import load_model
from deq_flax.train.phases import make_phases

TEXTS, PROMPT, TOKENS = 8, 32, 64
"""Texts that are generated, the words of their prompts, and those that are added."""


class Score(NamedTuple):
    """A model on the validation text, solved in one way."""

    perplexity: float
    converged: float
    """Share of the sequences whose relative residual is at most the tolerance of training."""
    evaluations: float


def scores(config: Config, model: Any, solve_of: Callable[[jax.Array], Any], counts: list[int]) -> list[Score]:
    """The model under each of the solves `solve_of(count)`, one compiled program."""
    task, (graphdef, state) = make_task(config), nnx.split(model)

    @jax.jit
    def score(state: Any, batch: Any, carry: Any, count: jax.Array) -> tuple[Any, ...]:
        _, out = task.loss(nnx.merge(graphdef, state), batch, carry, solve=solve_of(count))
        loss, stats = out.metrics["loss"], out.stats
        return out.carry, loss.total, loss.count, stats.converged.mean(), stats.nfe

    batches, rows = task.eval_batches("valid"), []
    for count in counts:
        carry, sums = task.fresh_carry(model, task.eval_batch_size), np.zeros(4)
        for i in range(len(batches)):
            carry, *numbers = score(state, batches[i], carry, count)
            sums += np.asarray(numbers)
        rows.append(Score(float(np.exp(sums[0] / sums[1])), *(float(x) for x in sums[2:] / len(batches))))
    return rows


def anytime(config: Config, model: Any, evaluations: list[int]) -> list[Score]:
    """The model after each number of plain iterations."""
    assert config.deq is not None
    one = Picard(tol=config.deq.tol, max_steps=1)

    def solve_of(count: jax.Array) -> Any:
        def iterate(f: Any, z0: Any) -> tuple[Any, None]:
            z = jax.lax.fori_loop(0, count, lambda _, z: f(z), z0)
            return fixed_point(lambda _: f(z), z, solver=one), None

        return iterate

    return scores(config, model, solve_of, evaluations)


def solved(config: Config, model: Any) -> Score:
    """The model as evaluation in training solves it."""
    phase = make_phases(config.deq).evaluation
    (score,) = scores(config, model, lambda _: phase.solve(), [0])
    return score


def perplexities(config: Config, models: list[Any], evaluations: list[int]) -> tuple[list[str], list[list[float]]]:
    """The row of a model, given its seeds, and for each of them the perplexity after each number of plain iterations."""
    seeds, full = [anytime(config, model, evaluations) for model in models], [solved(config, model) for model in models]
    cells = [f"{mean(x.perplexity for x in at):.1f} ({mean(x.converged for x in at):.0%})" for at in zip(*seeds, strict=True)]
    cells.append(tables.spread([score.perplexity for score in full], "{:.1f}".format))
    cells.append(tables.spread([score.converged for score in full], "{:.0%}".format))
    cells.append(f"{mean(score.evaluations for score in full):.1f}")
    return cells, [[score.perplexity for score in seed] for seed in seeds]


def last_checkpoint(workdir: Path) -> Path:
    """The checkpoint of the end of a run; its best one may be earlier."""
    folder = workdir / "checkpoints"
    return folder / str(max(steps_in(folder)))


def text_of(generator: Generator, prompts: list[np.ndarray]) -> np.ndarray:
    """The greedy continuation of every prompt, each alone, (B, TOKENS)."""
    return np.stack([[int(token_B[0]) for token_B, _ in generator.tokens([prompt], TOKENS)] for prompt in prompts])


def reading(generator: Generator, prompts: list[np.ndarray], text_BL: np.ndarray) -> tuple[float, float]:
    """Read texts word by word, each alone: the share of words that the generator would choose itself, evaluations a word."""
    chosen, nfe = [], []
    for prompt, text_L in zip(prompts, text_BL, strict=True):
        state = generator.start([prompt])
        for word in text_L:
            chosen.append(state.token_B)
            state = generator.step(state._replace(token_B=np.array([word])))
            nfe.append(state.nfe)
    same = np.concatenate(jax.device_get(chosen)) == text_BL.reshape(-1)
    return float(same.mean()), float(np.mean(jax.device_get(nfe)))


def speed(generator: Generator, prompts: list[np.ndarray]) -> float:
    """Words a second of processor time, of all texts together."""
    state = generator.step(generator.start(prompts))
    jax.block_until_ready(state)
    start = process_time()
    for _ in range(TOKENS):
        state = generator.step(state)
    jax.block_until_ready(state)
    return TOKENS * len(prompts) / (process_time() - start)


@contextmanager
def cold_starts() -> Iterator[None]:
    """Within this context, generators start every solve of a DEQ-Transformer at zero."""

    def zeros(memory: Memory, injection_BLJ: jax.Array) -> jax.Array:
        return jnp.zeros((*injection_BLJ.shape[:2], memory.states_BMD.shape[-1]), memory.states_BMD.dtype)

    with mock.patch.object(library, "nearest_states", zeros):
        yield


def texts_to_write(config: Config) -> tuple[list[np.ndarray], np.ndarray]:
    """Prompts from the validation text, and the words that follow them there, (B, TOKENS)."""
    words, starts = make_task(config).corpus.valid, [i * 500 for i in range(TEXTS)]
    prompts = [np.asarray(words[start : start + PROMPT], np.int32) for start in starts]
    return prompts, np.stack([words[start + PROMPT : start + PROMPT + TOKENS] for start in starts]).astype(np.int32)


def generation(config: Config, models: list[Any], limits: list[int], name: str) -> list[list[str]]:
    """Rows of the table of generation; the last one has no limit but 60, at a tolerance of 1e-5."""
    prompts, given_BL = texts_to_write(config)
    solver = make_phases(config.deq).evaluation.solver
    assert solver is not None

    def make(model: Any, solver: Solver) -> Generator:
        return Generator(model, solver=solver, sampling=Sampling(), memory=default_memory(config))

    full = solver.with_limits(max_steps=60, tol=1e-5)
    texts = [text_of(make(model, full), prompts) for model in models]

    def row(label: str, solver: Solver) -> list[str]:
        generators = [make(model, solver) for model in models]
        read = [
            (*reading(generator, prompts, text_BL), reading(generator, prompts, given_BL)[1])
            for generator, text_BL in zip(generators, texts, strict=True)
        ]
        one, together = speed(generators[0], prompts[:1]), speed(generators[0], prompts)
        same, own, given = (mean(column) for column in zip(*read, strict=True))
        cells = [f"`{name}`", label, f"{own:.2f}", f"{given:.2f}", f"{same:.1%}", f"{one:.0f}", f"{together:.0f}"]
        print(" | ".join(cells), flush=True)
        return cells

    rows = [row(str(limit), solver.with_limits(max_steps=limit)) for limit in limits]
    if isinstance(models[0].fresh_memory(1), Memory):
        with cold_starts():
            rows.append(row(f"{max(limits)}, cold", solver.with_limits(max_steps=max(limits))))
    return [*rows, row("60, tol 1e-5", full)]


def models(workdirs: list[Path]) -> dict[str, list[Path]]:
    """Name of a model -> the runs of its seeds."""
    found: dict[str, list[Path]] = {}
    for workdir in workdirs:
        found.setdefault(re.sub(r"_\d+$", "", workdir.name), []).append(workdir)
    return found


def draw(runs: dict[str, list[Path]], anytimes: dict[str, list[list[float]]], evaluations: list[int], file: str) -> None:
    """Draw perplexity against minutes of training, and against evaluations: model -> seed -> perplexity at each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def line(axis: Any, x: list[float], seeds: list[list[float]], **style: Any) -> Any:
        """Draw the mean of the seeds, and a bar from the lowest to the highest."""
        y = np.asarray(seeds)
        ends = [y.mean(0) - y.min(0), y.max(0) - y.mean(0)]
        return axis.errorbar(x, y.mean(0), yerr=ends, marker="o", ms=4, capsize=2, **style)[0].get_color()

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, workdirs in runs.items():
        minutes, perplexity = curves([read(workdir) for workdir in workdirs])
        color = line(left, minutes, perplexity, label=name)
        if name in anytimes:
            line(right, evaluations, anytimes[name], color=color)
        else:
            right.axhline(mean(seed[-1] for seed in perplexity), color=color, ls=":", lw=1)
    left.set(xlabel="minutes of training", ylabel="perplexity, valid", yscale="log")
    right.set(xlabel="evaluations of f", xscale="symlog", yscale="log")
    right.set_xticks(evaluations)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = tables.parser(__doc__, page=tables.LANGUAGE)
    parser.add_argument("workdirs", nargs="+", type=Path, help="of runs")
    default, none = [0, 1, 2, 4, 8, 16], "none: skip it"
    parser.add_argument("--evaluations", nargs="*", type=int, default=default, help=f"of the table of perplexities; {none}")
    parser.add_argument("--limits", nargs="*", type=int, default=[1, 2, 4, 8], help=f"of generation; {none}")
    parser.add_argument("--draw", help="draw the figure to this file")
    arguments = parser.parse_args()
    limited, generated, anytimes = [], [], {}
    runs = models(arguments.workdirs)
    for name, workdirs in runs.items():
        config = read_run_config(workdirs[0])
        if config.deq is None:
            continue
        loaded = [load_model(last_checkpoint(workdir)).model for workdir in workdirs]
        if arguments.evaluations:
            cells, anytimes[name] = perplexities(config, loaded, arguments.evaluations)
            limited.append([f"`{name}`", *cells])
            print(" | ".join(limited[-1]), flush=True)
        if arguments.limits:
            generated += generation(config, loaded, arguments.limits, name)
    if limited:
        head = ["model", *map(str, arguments.evaluations), "solved", "converged", "evaluations of a solve"]
        what = "Perplexity on the validation text, and the share of sequences that have settled"
        text = f"{turns.machine(['jax'])}. {what}; means of the seeds:\n\n{tables.markdown(head, limited)}"
        tables.publish("few evaluations", text, arguments.write)
    if generated:
        head = ["model", "limit", "evaluations a word", "the same, given text", "same words"]
        head += ["words/s, one text", f"words/s, {TEXTS} texts"]
        text = f"{turns.machine(['jax'])}. {TOKENS} words, processor time:\n\n{tables.markdown(head, generated)}"
        tables.publish("generation with few evaluations", text, arguments.write)
    if arguments.draw:
        draw(runs, anytimes, arguments.evaluations, arguments.draw)


if __name__ == "__main__":
    main()
