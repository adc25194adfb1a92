"""Perplexity against time and memory of models with equal numbers of parameters, on Penn Treebank.

    pip install -r requirements.txt -r requirements-plot.txt
    python -m benchmarks.ptb --path DIR [--steps 480] [--seeds 0 1 2] [--only ...] [--full] [--draw docs/ptb.png] [--write]

DIR has ptb.{train,valid,test}.txt. The models are trained one after the other by the public command; a second call continues
where the first was stopped. By default they have 1.95M parameters, for two CPU cores; with `--full` 24M, as configured. Time is
that of training steps, without compilation and evaluation; with `--processor_time` that of the processor, for a machine that
has other work too. Memory is a step's peak by its compiler's analysis.
"""

import json
import math
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tables, training, turns


class Model(NamedTuple):
    """A line of the table."""

    label: str
    variant: str
    """Of configs/ptb.py."""
    small: dict[str, Any]
    """Changes to the variant, beside SMALL, so that it has 1.95M parameters."""
    gradient: dict[str, Any]
    """Changes to section deq."""


_PROPOSAL = {"model.d_inner": 315, "model.proposal_blocks": 3}
MODELS = {
    "ift": Model("Broyden both ways", "ift", {}, {}),
    "base": Model("Anderson, regularized", "base", {"deq.pretrain_steps": 100}, {}),
    "reversible": Model("reversible iteration", "reversible", {}, {}),
    "deq_lm": Model("3 blocks, 12 unrolled", "deq_lm", {"model.d_inner": 463}, {}),
    "explicit": Model("Transformer-XL, 4 blocks", "explicit", {"model.d_inner": 315, "model.blocks": 4}, {}),
    "proposal": Model("3 blocks propose, 1 refines; implicit", "proposal", _PROPOSAL, {"deq.gradient": "implicit"}),
    "proposal_neumann": Model(
        "the same; Neumann, 2 terms", "proposal", _PROPOSAL, {"deq.gradient": "neumann", "deq.gradient_options.terms": 2}
    ),
    "proposal_phantom": Model("the same; phantom, 5 steps", "proposal", _PROPOSAL, {"deq.gradient": "phantom"}),
    "proposal_unroll": Model(
        "the same; unrolled, last 2", "proposal", _PROPOSAL, {"deq.gradient": "unroll", "deq.gradient_options.last": 2}
    ),
}
SMALL = {
    **{"data.batch_size": 16, "data.seq_len": 48, "data.eval_seq_len": 48, "model.d_model": 128, "model.d_embed": 128},
    **{"model.n_head": 4, "model.d_head": 32, "model.d_inner": 2048, "model.mem_len": 48, "model.dropout": 0.1},
    **{"model.attention_dropout": 0.0, "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 50, "train.ema_decay": 0.0},
}
"""Changes to all variants, for 1.95M parameters, of which 0.67M are not embeddings."""


def changes(model: Model, path: str, steps: int, full: bool) -> dict[str, Any]:
    """The overrides of a model, {'section.key': value}."""
    often: dict[str, Any] = {"train.steps": steps, "train.log_every": steps // 30, "train.eval_every": steps // 6}
    often |= {"train.checkpoint_every": steps // 6, "data.path": path}
    return ({} if full else SMALL | model.small) | model.gradient | often


PROCESSOR_TIME = """
import runpy, time
time.perf_counter = time.process_time
runpy.run_module("deq_flax.main", run_name="__main__", alter_sys=True)
"""
"""The training command with the processor's time in place of the clock's."""


def train(model: Model, workdir: Path, options: dict[str, Any], processor_time: bool) -> None:
    """Run the training command, which only evaluates if the run is complete."""
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    program = ["-c", PROCESSOR_TIME] if processor_time else ["-m", "deq_flax.main"]
    command = [sys.executable, *program, "--config", f"configs/ptb.py:{model.variant}", "--workdir", str(workdir)]
    subprocess.run([*command, *flags], check=True)


def curve(workdir: Path) -> tuple[list[float], list[float], dict[str, float]]:
    """(minutes of training at each evaluation, perplexity there, last training line) of a run."""
    minutes, perplexity, last, spent, before = [], [], {}, 0.0, 0
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        if line["split"] == "train":
            spent += (line["step"] - before) / line["steps_per_second"] / 60
            before, last = line["step"], line
        elif line["split"] == "valid":
            minutes.append(spent)
            perplexity.append(line["ppl"])
    return minutes, perplexity, last


def facts(model: Model, options: dict[str, Any]) -> tuple[int, float]:
    """The number of parameters, and the peak memory of a training step in megabytes."""
    import jax

    from benchmarks.memory import peak

    config = training.resolved(f"configs/ptb.py:{model.variant}", options)
    it = training.Training(config)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(it.run.state.params))
    jacobian_loss = config.deq is not None and config.deq.jacobian_weight > 0
    return parameters, peak(it.traced(jacobian_loss=jacobian_loss).lower().compile())[0]


class Result(NamedTuple):
    """The runs of a model, one for each seed."""

    minutes: list[float]
    """Of training at each evaluation, the mean of the seeds."""
    perplexity: list[list[float]]
    """On the validation split at each evaluation, for each seed."""
    last: dict[str, float]
    """The last training line of the first seed."""
    parameters: int
    megabytes: float


def measure(name: str, arguments: Namespace) -> Result:
    """Train a model with every seed, or read what was trained before."""
    model = MODELS[name]
    options = changes(model, arguments.path, arguments.steps, arguments.full)
    curves = []
    for seed in arguments.seeds:
        folder = arguments.workdir / f"{name}_{arguments.steps}_{seed}"
        train(model, folder, options | {"train.seed": seed}, arguments.processor_time)
        curves.append(curve(folder))
    minutes = [statistics.mean(at) for at in zip(*(minutes for minutes, *_ in curves), strict=True)]
    return Result(minutes, [perplexity for _, perplexity, _ in curves], curves[0][2], *facts(model, options))


def draw(results: dict[str, Result], file: str) -> None:
    """Draw perplexity against time and against memory; a bar spans the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, it in results.items():
        mean = [statistics.mean(at) for at in zip(*it.perplexity, strict=True)]
        ends = [perplexity[-1] for perplexity in it.perplexity]
        marker, line_style = ("s", "--") if name.startswith("proposal") else ("o", "-")
        (line,) = left.loglog(it.minutes, mean, marker=marker, ls=line_style, ms=4, label=f"{name}: {MODELS[name].label}")
        spread = [[mean[-1] - min(ends)], [max(ends) - mean[-1]]]
        right.errorbar([it.megabytes], [mean[-1]], yerr=spread, fmt=marker, color=line.get_color(), capsize=3)
    left.set(xlabel="minutes of training", ylabel="perplexity, valid")
    right.set(xlabel="megabytes at the peak of a step", ylabel="perplexity, valid, at the end")
    right.margins(x=0.25, y=0.15)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
    left.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--path", required=True, help="folder of the three splits")
    parser.add_argument("--steps", type=int, default=480, help="of each model (480)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of each model (0)")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="the models (all)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ptb"), help="holds a workdir for each run (runs/ptb)")
    parser.add_argument("--full", action="store_true", help="the models as configured, of 24M parameters")
    parser.add_argument("--processor_time", action="store_true", help="count the time of the processor, not the clock's")
    parser.add_argument("--draw", help="draw the figure to this file")
    arguments = parser.parse_args()
    rows, results = [], {}
    for name in arguments.only:
        it = measure(name, arguments)
        results[name], ends = it, [perplexity[-1] for perplexity in it.perplexity]
        numbers = [f"{it.parameters / 1e6:.2f}M", f"{it.megabytes:.0f}", f"{1 / it.last['steps_per_second']:.2f}"]
        numbers += [f"{it.minutes[-1]:.1f}", f"{it.last['forward_nfe']:.1f}" if "forward_nfe" in it.last else ""]
        spread = f" ({min(ends):.1f} to {max(ends):.1f})" if len(ends) > 1 else ""
        rows.append([f"`{name}`: {MODELS[name].label}", *numbers, f"{statistics.mean(ends):.1f}{spread}"])
    head = ["model", "parameters", "MB of a step", "s a step", "minutes", "evaluations", "perplexity, valid"]
    seeds = f"{len(arguments.seeds)} seeds (mean, and lowest to highest)" if len(arguments.seeds) > 1 else "one seed"
    seeds += ", processor time" if arguments.processor_time else ""
    text = f"{turns.machine(['jax'])}; {arguments.steps} steps each, {seeds}.\n\n{tables.markdown(head, rows)}"
    tables.publish("ptb", text, arguments.write)
    if arguments.draw:
        draw(results, arguments.draw)


if __name__ == "__main__":
    main()
