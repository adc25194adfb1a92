"""A trained language model with fewer evaluations than its solver asks for: perplexity, and generation.

    python -m benchmarks.few_steps DIR [DIR ...] [--evaluations 0 1 2 4 8 16] [--limits 1 2 3 4 6 8 12] [--write]

DIR is the workdir of a run with an equilibrium; a table has a row for each, such as a model before and after it was trained
with the consistency loss.

- Perplexity on the validation text after exactly so many evaluations of plain iteration, z <- f(z), from the initial guess. The
  last columns are those of a full solve: its perplexity, its evaluations, and the share of sequences that converged.
- Greedy generation with a limit on the evaluations of every solve: speed and evaluations for one text, speed for all together,
  and the share of words that are those of a model without a limit given the same words before.
"""

import dataclasses
from pathlib import Path
from time import process_time
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import tables, turns
from deq_flax.config import Config, make_task, phases_of, read_run_config
from deq_flax.equilibrium import Solver
from deq_flax.generate import default_memory
from deq_flax.models.generation import Generator, Sampling
from deq_flax.pretrained import load_model
from deq_flax.train.evaluate import EvalOptions, evaluate_checkpoint
from deq_flax.train.phases import make_phases

TEXTS, PROMPT, TOKENS = 8, 32, 64
"""Texts that are generated, the words of their prompts, and those that are added."""


def anytime(workdir: Path, config: Config, evaluations: list[int]) -> list[float]:
    """Perplexity on the validation text after so many evaluations each."""
    assert config.deq is not None
    plain = {"gradient": "unroll", "gradient_options": {}, "eval_unrolled": True, "max_steps": max(evaluations)}
    plain |= {"eval_max_steps": 0, "max_steps_jitter": 0, "consistency_weight": 0.0}
    config = dataclasses.replace(config, deq=dataclasses.replace(config.deq, **plain))
    found = evaluate_checkpoint(
        make_task(config),
        workdir,
        phases=phases_of(config),
        mesh=config.mesh,
        options=EvalOptions(max_steps_sweep=tuple(evaluations)),
        seed=0,
    )
    return [row["ppl"] for row in found.sweep if row["split"] == "valid"]


def solved(config: Config, model: Any, limit: int) -> tuple[float, float, float]:
    """Perplexity, evaluations and the share of converged sequences of full solves of the validation text."""
    assert config.deq is not None
    task = make_task(config)
    solve = make_phases(dataclasses.replace(config.deq, eval_max_steps=limit)).evaluation.solve()
    graphdef, state = nnx.split(model)

    @jax.jit
    def score(state: Any, batch: Any, carry: Any) -> tuple[Any, ...]:
        _, out = task.loss(nnx.merge(graphdef, state), batch, carry, solve=solve)
        return out.carry, out.metrics["loss"].total, out.metrics["loss"].count, out.stats.nfe, out.stats.converged.mean()

    carry, sums, batches = task.fresh_carry(model, task.eval_batch_size), np.zeros(4), task.eval_batches("valid")
    for i in range(len(batches)):
        carry, *numbers = score(state, batches[i], carry)
        sums += np.asarray(numbers)
    return float(np.exp(sums[0] / sums[1])), *(sums[2:] / len(batches))


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


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("workdirs", nargs="+", type=Path, help="of runs")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[0, 1, 2, 4, 8, 16], help="of the table of perplexities")
    parser.add_argument("--limits", nargs="*", type=int, default=[1, 2, 3, 4, 6, 8, 12], help="of generation; none: skip it")
    parser.add_argument("--full", type=int, default=60, help="limit of a full solve (60)")
    arguments = parser.parse_args()
    curves, rows = [], []
    for workdir in arguments.workdirs:
        config, model = read_run_config(workdir), load_model(workdir).model
        perplexity, evaluations, converged = solved(config, model, arguments.full)
        curve = [f"{ppl:.1f}" for ppl in anytime(workdir, config, arguments.evaluations)]
        curves.append([f"`{workdir.name}`", *curve, f"{perplexity:.1f}", f"{evaluations:.1f}", f"{converged:.0%}"])
        print(" | ".join(curves[-1]), flush=True)
        if arguments.limits:
            rows += generation(config, model, arguments.limits, workdir.name)
    head = ["model", *map(str, arguments.evaluations), "solved", "evaluations", "converged"]
    text = f"{turns.machine(['jax'])}. Perplexity on the validation text by evaluations:\n\n{tables.markdown(head, curves)}"
    if rows:
        head = ["model", "limit", "evaluations", "words/s, one text", f"words/s, {TEXTS} texts", "same words"]
        text += f"\nGreedy generation, {TOKENS} words, processor time:\n\n{tables.markdown(head, rows)}"
    tables.publish("few evaluations", text, arguments.write)


if __name__ == "__main__":
    main()
