"""Perplexity of language models against time and against parameters, at equal numbers of them.

    pip install -r requirements.txt -r requirements-plot.txt
    python -m benchmarks.language [--ptb DIR] [--steps N] [--seeds 0 1 2] [--only MODELS] [--widths N N] [--draw FILE] [--write]

The text is the English that Python includes, and the models have 0.28M parameters. With `--ptb`, the folder of the files
ptb.{train,valid,test}.txt, it is Penn Treebank and they have 1.95M, with `--full` besides 24M, as configured. `--widths` trains
each model with other numbers of features, its inner layers in proportion. The models are trained one after the other by the
public command; a second call continues where the first was stopped. Time is that of training steps, without compilation and
evaluation; with `--processor_time` that of the processor, for a machine that has other work too. Memory is a step's peak by its
compiler's analysis.

NAME_longer and NAME_consistency go on from the end of NAME for half as many steps, without and with the consistency loss. The
runs are the folders NAME_STEPS_SEED of `--workdir`, where STEPS are those of NAME.
"""

import math
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tables, training, turns
from deq_flax.errors import UserError
from deq_flax.run_log.metrics_file import read_metrics

Changes = dict[str, Any]
"""{'section.key': value}."""


class Model(NamedTuple):
    """A line of the table: a variant of a config, and what it changes at each size."""

    label: str
    ptb: tuple[str, Changes]
    """Variant of configs/ptb.py, and changes to it, beside PTB, for 1.95M parameters."""
    tiny: tuple[str, Changes]
    """Variant of configs/wt103.py, and changes to it for 0.28M parameters."""
    changes: Changes
    """Changes at every size."""
    start: str = ""
    """The model from whose end it goes on, for half as many steps; '': it starts anew."""


def _proposal(label: str, gradient: Changes) -> Model:
    return Model(label, ("proposal", {"model.d_inner": 315, "model.proposal_blocks": 3}), ("tiny_proposal", {}), gradient)


_RATE: Changes = {"optimizer.learning_rate": 2e-3}
"""The learning rate of tiny_explicit and tiny_proposal, for all models."""
_PLAIN = _RATE | {"deq.jacobian_weight": 0.0, "deq.jacobian_frequency": 0.0, "deq.pretrain_steps": 0}
REGULARIZED = _RATE | {"deq.jacobian_weight": 0.3, "deq.pretrain_steps": 100}
"""Changes to wt103:tiny that keep what the published tables trained it with."""
_UNROLLED = {"deq.solver": "picard", "deq.max_steps": 12, "deq.gradient": "unroll", "model.blocks": 2, "model.d_inner": 68}
_UNROLLED |= {"model.pre_norm": True, "model.affine_norm": True}
MODELS = {
    "ift": Model(
        "Broyden both ways",
        ("ift", {}),
        ("tiny", _PLAIN | {"deq.solver": "broyden", "deq.max_steps": 30, "deq.backward_max_steps": 30}),
        {},
    ),
    "base": Model("Anderson, regularized", ("base", {"deq.pretrain_steps": 100}), ("tiny", REGULARIZED), {}),
    "deq_lm": Model(
        "3 blocks (2 in the small model), 12 unrolled", ("deq_lm", {"model.d_inner": 463}), ("tiny", _PLAIN | _UNROLLED), {}
    ),
    "explicit": Model("Transformer-XL", ("explicit", {"model.d_inner": 315, "model.blocks": 4}), ("tiny_explicit", {}), {}),
    "proposal": _proposal("explicit, the last block to its equilibrium; implicit", {"deq.gradient": "implicit"}),
    "proposal_neumann": _proposal("the same; Neumann, 2 terms", {"deq.gradient": "neumann", "deq.gradient_options.terms": 2}),
    "proposal_phantom": _proposal("the same; phantom, 5 steps", {"deq.gradient": "phantom"}),
    "proposal_unroll": _proposal(
        "the same; unrolled, the last 2 of 6", {"deq.gradient": "unroll", "deq.max_steps": 6, "deq.gradient_options.last": 2}
    ),
    "not_injected": _proposal("the proposal as initial guess alone; implicit", {"model.inject_proposal": False}),
}
_CONTINUED = {"deq.pretrain_steps": 0, "optimizer.learning_rate": 5e-4}
MODELS |= {
    f"{name}_{suffix}": MODELS[name]._replace(
        label=f"`{name}` and half as many steps more{label}", changes=MODELS[name].changes | _CONTINUED | own, start=name
    )
    for name in ("base", "proposal")
    for suffix, label, own in (("longer", "", {}), ("consistency", ", consistency loss", {"deq.consistency_weight": 1.0}))
}
PTB = {
    **{"data.batch_size": 16, "data.seq_len": 48, "data.eval_seq_len": 48, "model.d_model": 128, "model.d_embed": 128},
    **{"model.n_head": 4, "model.d_head": 32, "model.d_inner": 2048, "model.mem_len": 48, "model.dropout": 0.1},
    **{"model.attention_dropout": 0.0, "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 50, "train.ema_decay": 0.0},
}
"""Changes to all variants of configs/ptb.py, for 1.95M parameters, of which 0.67M are not embeddings."""


def steps_of(model: Model, arguments: Namespace) -> int:
    """The number of steps that a model is trained for."""
    return max(1, arguments.steps // 2) if model.start else arguments.steps


def chosen(model: Model, arguments: Namespace) -> tuple[str, Changes]:
    """The config of a model at the size asked for, and the changes to it."""
    steps = steps_of(model, arguments)
    often: Changes = {"train.steps": steps, "train.log_every": max(1, steps // 30), "train.eval_every": max(1, steps // 6)}
    often["train.checkpoint_every"] = often["train.eval_every"]
    if arguments.ptb is None:
        variant, own = model.tiny
        return f"configs/wt103.py:{variant}", own | model.changes | often
    variant, own = model.ptb
    own = {} if arguments.full else PTB | own
    return f"configs/ptb.py:{variant}", own | model.changes | often | {"data.path": arguments.ptb}


def resized(config: str, changes: Changes, width: int) -> Changes:
    """Changes that make a model `width` features wide, and its inner layers in proportion."""
    model = training.resolved(config, changes).model
    features: Changes = {"model.d_model": width, "model.d_embed": width, "model.d_head": width // model.n_head}
    return features | {"model.d_inner": round(model.d_inner * width / model.d_model)}


PROCESSOR_TIME = """
import runpy, time
time.perf_counter = time.process_time
runpy.run_module("deq_flax.main", run_name="__main__", alter_sys=True)
"""
"""The training command with the processor's time in place of the clock's."""


def train(config: str, workdir: Path, changes: Changes, processor_time: bool) -> None:
    """Run the training command, which only evaluates if the run is complete."""
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    program = ["-c", PROCESSOR_TIME] if processor_time else ["-m", "deq_flax.main"]
    subprocess.run([sys.executable, *program, "--config", config, "--workdir", str(workdir), *flags], check=True)


def complete(workdir: Path, steps: int) -> bool:
    """Whether a run has come to its end."""
    try:
        return any(line["split"] == "valid" and line["step"] == steps for line in read_metrics(workdir))
    except UserError:  # there is no run yet
        return False


class Run(NamedTuple):
    """A run's training; what was evaluated since, perhaps with other limits, is left out."""

    minutes: list[float]
    """Of training at each evaluation."""
    perplexity: list[float]
    """On the validation split at each evaluation."""
    seconds: float
    """A step's, the median of the training lines, which the first ones do not move: they warm up, or train unrolled."""
    last: dict[str, Any]
    """The last training line."""


def read(workdir: Path) -> Run:
    """The training of a run, from its metrics.jsonl."""
    minutes, perplexity, seconds, last, spent = [], [], [], {"step": 0}, 0.0
    for line in read_metrics(workdir):
        if line["split"] == "train":
            seconds.append(1 / line["steps_per_second"])
            spent += (line["step"] - last["step"]) * seconds[-1] / 60
            last = dict(line)
        elif line["split"] == "valid":
            minutes.append(spent)
            perplexity.append(line["ppl"])
    return Run(minutes, perplexity, statistics.median(seconds), last)


def facts(path: str, changes: Changes) -> tuple[int, float]:
    """The number of parameters, and the peak memory of a training step in megabytes."""
    import jax

    from benchmarks.memory import peak

    config = training.resolved(path, changes)
    it = training.Training(config)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(it.run.state.params))
    jacobian_loss = config.deq is not None and config.deq.jacobian_weight > 0
    return parameters, peak(it.traced(jacobian_loss=jacobian_loss).lower().compile())[0]


def curves(runs: list[Run]) -> tuple[list[float], list[list[float]]]:
    """Minutes of training at each evaluation, the mean of the runs, and the perplexity there, for each run."""
    minutes = [statistics.mean(at) for at in zip(*(run.minutes for run in runs), strict=True)]
    return minutes, [run.perplexity for run in runs]


class Result(NamedTuple):
    """The runs of a model, one for each seed."""

    runs: list[Run]
    parameters: int
    megabytes: float

    @property
    def ends(self) -> list[float]:
        """Perplexity on the validation split at the end of training, for each seed."""
        return [run.perplexity[-1] for run in self.runs]

    @property
    def evaluations(self) -> list[float]:
        """Those of a solve, and of the adjoint solve if there is one, at the end of training: means of the seeds."""
        lines = [run.last for run in self.runs]
        found = [key for key in ("forward_nfe", "backward_nfe") if key in lines[0]]
        return [statistics.mean(line[key] for line in lines) for key in found]


def trained(name: str, width: int, seed: int, arguments: Namespace) -> Path:
    """The folder of a run, which is trained unless it is complete; before it, the one that it goes on from."""
    model = MODELS[name]
    config, changes = chosen(model, arguments)
    folder = arguments.workdir / f"{name}{f'_wide_{width}' if width else ''}_{arguments.steps}_{seed}"
    if not complete(folder, steps_of(model, arguments)):
        changes |= resized(config, changes, width) if width else {}
        if model.start:
            changes |= {"checkpoint.init_from": str(trained(model.start, width, seed, arguments))}
        train(config, folder, changes | {"train.seed": seed}, arguments.processor_time)
    return folder


def measure(name: str, width: int, arguments: Namespace) -> Result:
    """Train a model with every seed, or read what was trained before; a width of 0 is its own."""
    config, changes = chosen(MODELS[name], arguments)
    changes |= resized(config, changes, width) if width else {}
    runs = [read(trained(name, width, seed, arguments)) for seed in arguments.seeds]
    return Result(runs, *facts(config, changes))


def draw(results: dict[str, list[Result]], file: str) -> None:
    """Draw perplexity against time and against parameters, each model at its widths; a bar spans the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for name, sizes in results.items():
        marker, line_style = ("s", "--") if name.startswith("proposal") else ("o", "-")
        color = None
        for it in sizes:
            minutes, perplexity = curves(it.runs)
            mean = [statistics.mean(at) for at in zip(*perplexity, strict=True)]
            label = f"{name}: {MODELS[name].label}" if it is sizes[0] else None
            (line,) = left.loglog(minutes, mean, marker=marker, ls=line_style, ms=4, color=color, label=label)
            color = line.get_color()
        ends = [it.ends for it in sizes]
        middle = [statistics.mean(end) for end in ends]
        spread = [
            [m - min(end) for m, end in zip(middle, ends, strict=True)],
            [max(end) - m for m, end in zip(middle, ends, strict=True)],
        ]
        right.errorbar(
            [it.parameters / 1e6 for it in sizes], middle, yerr=spread, fmt=marker, ls=line_style, color=color, capsize=3
        )
    left.set(xlabel="minutes of training", ylabel="perplexity, valid")
    right.set(xlabel="million parameters", ylabel="perplexity, valid, at the end", xscale="log", yscale="log")
    parameters = [it.parameters / 1e6 for sizes in results.values() for it in sizes]
    right.set_xlim(0.8 * min(parameters), 1.25 * max(parameters))
    right.margins(y=0.15)
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_locator(NullLocator())
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_minor_formatter("{x:.0f}")
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xticks(sorted({round(count, 2) for count in parameters}))
    right.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = tables.parser(__doc__, page=tables.LANGUAGE)
    parser.add_argument("--ptb", help="folder of ptb.{train,valid,test}.txt; without it, the English that Python includes")
    parser.add_argument("--steps", type=int, default=480, help="of each model (480)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of each model (0)")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="the models (all)")
    parser.add_argument("--widths", type=int, nargs="+", default=[0], help="features of each model (its own)")
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/language"), help="holds a workdir for each run (runs/language)"
    )
    parser.add_argument("--full", action="store_true", help="with --ptb: the models as configured, of 24M parameters")
    parser.add_argument("--processor_time", action="store_true", help="count the time of the processor, not the clock's")
    parser.add_argument("--draw", help="draw the figure to this file")
    arguments = parser.parse_args()
    rows, results = [], {}
    for name in arguments.only:
        results[name] = [measure(name, width, arguments) for width in arguments.widths]
        for width, it in zip(arguments.widths, results[name], strict=True):
            label = f"`{name}`: {MODELS[name].label}" + (f"; width {width}" if width else "")
            seconds = statistics.mean(run.seconds for run in it.runs)
            numbers = [f"{it.parameters / 1e6:.2f}M", f"{it.megabytes:.0f}", f"{seconds:.3f}", f"{curves(it.runs)[0][-1]:.2f}"]
            numbers.append(", ".join(f"{count:.1f}" for count in it.evaluations))
            rows.append([label, *numbers, tables.spread(it.ends, "{:.1f}".format)])
    head = [
        "model",
        "parameters",
        "MB of a step",
        "s a step",
        "minutes",
        "evaluations, forward and adjoint",
        "perplexity, valid",
    ]
    seeds = f"{len(arguments.seeds)} seeds (mean, and lowest to highest)" if len(arguments.seeds) > 1 else "one seed"
    seeds += ", processor time" if arguments.processor_time else ""
    text = f"{turns.machine(['jax'])}; {arguments.steps} steps each, {seeds}.\n\n{tables.markdown(head, rows)}"
    if arguments.ptb is None:
        tables.publish("language models on Python's English", text, arguments.write)
    else:
        tables.publish("language models on Penn Treebank", text, arguments.write)
    if arguments.draw:
        draw(results, arguments.draw)


if __name__ == "__main__":
    main()
