"""Perplexity against time and memory of models with equal numbers of parameters, on Penn Treebank.

    pip install -r requirements.txt -r requirements-plot.txt
    python -m benchmarks.ptb --path DIR [--steps 480] [--workdir runs/ptb] [--full] [--draw docs/ptb.png] [--write]

DIR has ptb.{train,valid,test}.txt. The variants of configs/ptb.py are trained one after the other by the public command; a
second call continues where the first was stopped. By default they have 1.95M parameters, for two CPU cores; with `--full`
24M, as configured. Time is that of training steps, without compilation and evaluation; memory is a step's peak by its
compiler's analysis.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import tables, training, turns

VARIANTS = {
    "ift": "Broyden both ways",
    "base": "Anderson, regularized",
    "reversible": "reversible iteration",
    "deq_lm": "3 blocks, 12 unrolled",
    "explicit": "Transformer-XL, 4 blocks",
}
SMALL = {
    **{"data.batch_size": 16, "data.seq_len": 48, "data.eval_seq_len": 48, "model.d_model": 128, "model.d_embed": 128},
    **{"model.n_head": 4, "model.d_head": 32, "model.d_inner": 2048, "model.mem_len": 48, "model.dropout": 0.1},
    **{"model.attention_dropout": 0.0, "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 50, "train.ema_decay": 0.0},
}
"""Changes to all variants, for 1.95M parameters, of which 0.67M are not embeddings."""
OWN: dict[str, dict[str, Any]] = {
    "base": {"deq.pretrain_steps": 100},
    "deq_lm": {"model.d_inner": 463},
    "explicit": {"model.d_inner": 315, "model.blocks": 4},
}
"""Further changes to each variant, so that the numbers of parameters are equal."""


def changes(variant: str, path: str, steps: int, full: bool) -> dict[str, Any]:
    """The overrides of a variant, {'section.key': value}."""
    often: dict[str, Any] = {"train.steps": steps, "train.log_every": steps // 30, "train.eval_every": steps // 6}
    often |= {"train.checkpoint_every": steps // 6, "data.path": path}
    return ({} if full else SMALL | OWN.get(variant, {})) | often


def train(variant: str, workdir: Path, options: dict[str, Any]) -> None:
    """Run the training command, which only evaluates if the run is complete."""
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "deq_flax.main", "--config", f"configs/ptb.py:{variant}", "--workdir", str(workdir)]
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


def facts(variant: str, options: dict[str, Any]) -> tuple[int, float]:
    """The number of parameters, and the peak memory of a training step in megabytes."""
    import jax

    from benchmarks.memory import peak

    config = training.resolved(f"configs/ptb.py:{variant}", options)
    it = training.Training(config)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(it.run.state.params))
    jacobian_loss = config.deq is not None and config.deq.jacobian_weight > 0
    return parameters, peak(it.traced(jacobian_loss=jacobian_loss).lower().compile())[0]


def draw(results: dict[str, Any], file: str) -> None:
    """Draw perplexity against time and against memory; `results`: variant -> (minutes, perplexities, megabytes)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for variant, (minutes, perplexity, megabytes) in results.items():
        (line,) = left.loglog(minutes, perplexity, marker="o", ms=4, label=VARIANTS[variant])
        right.plot(megabytes, perplexity[-1], "o", color=line.get_color())
    left.set(xlabel="minutes of training", ylabel="perplexity, valid")
    right.set(xlabel="megabytes at the peak of a step", ylabel="perplexity, valid, at the end")
    right.margins(x=0.25, y=0.15)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--path", required=True, help="folder of the three splits")
    parser.add_argument("--steps", type=int, default=480, help="of each model (480)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ptb"), help="holds a workdir for each variant (runs/ptb)")
    parser.add_argument("--full", action="store_true", help="the models as configured, of 24M parameters")
    parser.add_argument("--draw", help="draw the figure to this file")
    arguments = parser.parse_args()
    rows, results = [], {}
    for variant, label in VARIANTS.items():
        options = changes(variant, arguments.path, arguments.steps, arguments.full)
        workdir = arguments.workdir / variant
        train(variant, workdir, options)
        minutes, perplexity, last = curve(workdir)
        parameters, megabytes = facts(variant, options)
        results[variant] = (minutes, perplexity, megabytes)
        numbers = [f"{parameters / 1e6:.2f}M", f"{megabytes:.0f}", f"{1 / last['steps_per_second']:.2f}", f"{minutes[-1]:.1f}"]
        numbers += [f"{last['forward_nfe']:.1f}" if "forward_nfe" in last else "", f"{perplexity[-1]:.1f}"]
        rows.append([f"`{variant}`: {label}", *numbers])
    head = ["model", "parameters", "MB of a step", "s a step", "minutes", "evaluations", "perplexity, valid"]
    text = f"{turns.machine(['jax'])}; {arguments.steps} steps each.\n\n{tables.markdown(head, rows)}"
    tables.publish("ptb", text, arguments.write)
    if arguments.draw:
        draw(results, arguments.draw)


if __name__ == "__main__":
    main()
