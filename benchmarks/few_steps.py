"""A trained language model with fewer evaluations than its solver asks for: perplexity, and generation.

    pip install -r requirements.txt -r requirements-plot.txt
    python -m benchmarks.few_steps DIR [DIR ...] [--evaluations 0 1 2 4 8 16] [--limits 1 2 4 8] [--draw FILE] [--write]

DIR is the workdir of a run; a table has a row for each model with an equilibrium, such as one before and after training with
the consistency loss. Runs whose names differ in the number that they end in, `NAME_0` and `NAME_1`, are seeds of one model.
The figure has perplexity against minutes of training, and against evaluations; a bar spans the seeds.

- Perplexity on the validation text after exactly so many evaluations of plain iteration, z <- f(z), from the initial guess, and
  the share of sequences whose residual is then below the tolerance. The last columns are those of the run's own solver.
- Greedy generation of the first seed, with a limit on the evaluations of every solve: speed and evaluations for one text, speed
  for all together, and the share of words that are those of a model without a limit given the same words before.
"""

import json
import re
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import tables, turns
from benchmarks.language import curve
from deq_flax.config import Config, make_task, read_run_config
from deq_flax.equilibrium import Picard, Solver, fixed_point
from deq_flax.generate import default_memory
from deq_flax.models.generation import Generator, Sampling
from deq_flax.pretrained import load_model
from deq_flax.train.phases import make_phases

TEXTS, PROMPT, TOKENS = 8, 32, 64
"""Texts that are generated, the words of their prompts, and those that are added."""


def anytime(config: Config, model: Any, evaluations: list[int]) -> list[tuple[float, float]]:
    """For each number of plain iterations: perplexity on the validation text, and the share of sequences that have settled.

    Settled: the relative residual is at most the tolerance of training.
    """
    assert config.deq is not None
    task, tol, (graphdef, state) = make_task(config), config.deq.tol, nnx.split(model)

    @jax.jit
    def score(state: Any, batch: Any, carry: Any, count: jax.Array) -> tuple[Any, ...]:
        def iterate(f: Any, z0: Any) -> tuple[Any, None]:
            z = jax.lax.fori_loop(0, count, lambda _, z: f(z), z0)
            return fixed_point(lambda _: f(z), z, solver=Picard(tol=tol, max_steps=1)), None

        _, out = task.loss(nnx.merge(graphdef, state), batch, carry, solve=iterate)
        return out.carry, out.metrics["loss"].total, out.metrics["loss"].count, out.stats.converged.mean()

    batches, rows = task.eval_batches("valid"), []
    for count in evaluations:
        carry, sums = task.fresh_carry(model, task.eval_batch_size), np.zeros(3)
        for i in range(len(batches)):
            carry, *numbers = score(state, batches[i], carry, count)
            sums += np.asarray(numbers)
        rows.append((float(np.exp(sums[0] / sums[1])), float(sums[2] / len(batches))))
    return rows


def solved(workdir: Path) -> tuple[float, float]:
    """Perplexity and evaluations of a solve with the limits of training, from the end of the run."""
    metrics = json.loads((workdir / "eval.json").read_text())["metrics"]["valid"]
    return metrics["ppl"], metrics["forward_nfe"]


def text_of(generator: Generator, prompts: list[np.ndarray]) -> np.ndarray:
    """The greedy continuation of every prompt, (B, TOKENS)."""
    return np.stack([tokens for tokens, _ in generator.tokens(prompts, TOKENS)], axis=1)


def agreement(generator: Generator, prompts: list[np.ndarray], text_BL: np.ndarray) -> float:
    """The share of words of a text that the generator takes to be the likeliest, given those before."""
    state, same = generator.start(prompts), 0.0
    for words_B in text_BL.T:
        same += float((np.asarray(state.token_B) == words_B).mean())
        state = generator.step(state._replace(token_B=jax.numpy.asarray(words_B)))
    return same / text_BL.shape[1]


def speed(generator: Generator, prompts: list[np.ndarray]) -> tuple[float, float]:
    """Words a second of processor time, of all texts together, and evaluations of a step."""
    state = generator.step(generator.start(prompts))
    nfe, start = [], process_time()
    for _ in range(TOKENS):
        state = generator.step(state)
        nfe.append(state.nfe)
    evaluations = float(np.mean(jax.device_get(nfe)))
    return TOKENS * len(prompts) / (process_time() - start), evaluations


def generation(config: Config, model: Any, limits: list[int], name: str) -> list[list[str]]:
    """Rows of the table of generation; the last one has no limit but 60, at a tolerance of 1e-5."""
    words = make_task(config).corpus.valid
    prompts = [np.asarray(words[i * 500 : i * 500 + PROMPT], np.int32) for i in range(TEXTS)]
    solver = make_phases(config.deq).evaluation.solver
    assert solver is not None

    def make(solver: Solver) -> Generator:
        return Generator(model, solver=solver, sampling=Sampling(), memory=default_memory(config))

    full = make(solver.with_limits(max_steps=60, tol=1e-5))
    text_BL = text_of(full, prompts)
    rows = []
    for label, generator in [*((str(n), make(solver.with_limits(max_steps=n))) for n in limits), ("60, tol 1e-5", full)]:
        one, evaluations = speed(generator, prompts[:1])
        together, _ = speed(generator, prompts)
        same = agreement(generator, prompts, text_BL)
        rows.append([f"`{name}`", label, f"{evaluations:.1f}", f"{one:.0f}", f"{together:.0f}", f"{same:.1%}"])
        print(" | ".join(rows[-1]), flush=True)
    return rows


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
        curves = [curve(workdir) for workdir in workdirs]
        minutes = [mean(at) for at in zip(*(minutes for minutes, *_ in curves), strict=True)]
        perplexity = [perplexity for _, perplexity, _ in curves]
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
    parser = tables.parser(__doc__)
    parser.add_argument("workdirs", nargs="+", type=Path, help="of runs")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[0, 1, 2, 4, 8, 16], help="of the table of perplexities")
    parser.add_argument("--limits", nargs="*", type=int, default=[1, 2, 4, 8], help="of generation; none: skip it")
    parser.add_argument("--draw", help="draw the figure to this file")
    arguments = parser.parse_args()
    curves, rows, anytimes = [], [], {}
    runs = models(arguments.workdirs)
    for name, workdirs in runs.items():
        config = read_run_config(workdirs[0])
        if config.deq is None:
            continue
        loaded = [load_model(workdir).model for workdir in workdirs]
        seeds = [anytime(config, model, arguments.evaluations) for model in loaded]
        anytimes[name] = [[ppl for ppl, _ in seed] for seed in seeds]
        shown = [f"{mean(p for p, _ in at):.1f} ({mean(share for _, share in at):.0%})" for at in zip(*seeds, strict=True)]
        ppl, evaluations = (list(column) for column in zip(*map(solved, workdirs), strict=True))
        curves.append([f"`{name}`", *shown, tables.spread(ppl, "{:.1f}".format), f"{mean(evaluations):.1f}"])
        print(" | ".join(curves[-1]), flush=True)
        if arguments.limits:
            rows += generation(config, loaded[0], arguments.limits, name)
    head = ["model", *map(str, arguments.evaluations), "solved", "evaluations of a solve"]
    what = "Perplexity on the validation text, and the share of sequences that have settled"
    text = f"{turns.machine(['jax'])}. {what}; means of the seeds:\n\n{tables.markdown(head, curves)}"
    if rows:
        head = ["model", "limit", "evaluations", "words/s, one text", f"words/s, {TEXTS} texts", "same words"]
        text += f"\nGreedy generation, {TOKENS} words, processor time:\n\n{tables.markdown(head, rows)}"
    tables.publish("few evaluations", text, arguments.write)
    if arguments.draw:
        draw(runs, anytimes, arguments.evaluations, arguments.draw)


if __name__ == "__main__":
    main()
