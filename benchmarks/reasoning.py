"""What models of recurrent depth learn, and how far it carries, by gradient, solver, model and seed.

    pip install -r requirements.txt -r requirements-plot.txt
    python -m benchmarks.reasoning --folder runs/reasoning [--only gradients] [--minutes 60] [--list] [--changed] [--write]

Runs are made in order, each in a workdir of its own that `--mode eval`, `solve` and `plot` read. A run that has its result,
FOLDER/results/NAME.json, is not made again; one that was stopped continues from its checkpoint. `--minutes`: begin no run later
than that. `--write` takes the results in FOLDER over into benchmarks/reasoning.jsonl, in place of those of the same runs, and
makes those tables and figures of docs/reasoning.md of which all results are in it. `--changed` names the results of
benchmarks/reasoning.jsonl that the code, or this version of JAX, would make by another program or from other data; to make them
again, give a new FOLDER.

Seconds are those of processor time, in one thread with XLA_FLAGS=--xla_cpu_multi_thread_eigen=false, so that other programs on
the machine do not count. Those of a step are measured at the trained weights. Memory is the compiler's: the temporary arrays of
a training step.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from benchmarks import reasoning_report, records, training

Changes = dict[str, Any]
"""Changes to a config: 'section.key' -> value."""

TIMED_STEPS = 8
"""Training steps that are timed."""
RESULTS = Path(__file__).parent / "reasoning.jsonl"
"""The results behind docs/reasoning.md."""


@dataclass(frozen=True)
class Run:
    """A training run, and evaluations of its checkpoint."""

    group: str
    """Table that it belongs to."""
    name: str
    """Its row there."""
    config: str
    """FILE or FILE:VARIANT."""
    changes: Changes
    seed: int = 0
    evaluations: dict[str, Changes] = field(default_factory=dict)
    """More evaluations by name, besides that at the end of training."""
    start: "Run | None" = None
    """The run from whose weights it starts."""

    @property
    def stem(self) -> str:
        """The name of its files."""
        words = "".join(c if c.isalnum() else " " for c in f"{self.group} {self.name}").split()
        return f"{'_'.join(words).lower()}_{self.seed}"

    def key(self, evaluation: str = "") -> str:
        """The name of its result, or of that of a further evaluation."""
        return f"{self.stem}.{evaluation}" if evaluation else self.stem

    def everything(self) -> Changes:
        """All changes to the config."""
        return self.changes | {"train.seed": self.seed}


def unrolled(**options: Any) -> Changes:
    """Plain iteration of a random number of steps, of which the last are differentiated."""
    return {"deq.gradient": "unroll", "deq.gradient_options": {"remat": False} | options}


def solved(gradient: str, solver: str, adjoint: str = "broyden", **options: Any) -> Changes:
    """A solved equilibrium. Histories are of ten pairs: the default keeps all steps of an evaluation."""
    kept = {name: {"memory": 10} if name in ("anderson", "broyden") else {} for name in (solver, adjoint)}
    return {
        "deq.gradient": gradient,
        "deq.gradient_options": options,
        "deq.solver": solver,
        "deq.solver_options": kept[solver],
        "deq.backward_solver": adjoint,
        "deq.backward_solver_options": kept[adjoint],
        "deq.max_steps_jitter": 0,
    }


HUNDRED: Changes = {"deq.max_steps": 100, "deq.backward_max_steps": 100}
"""Limits under which both solves reach their tolerance."""
GRADIENTS = {
    "Unroll(last=1)": unrolled(last=1),
    "Unroll(last=2)": unrolled(last=2),
    "Unroll(last=8)": unrolled(last=8),
    "Unroll(last=8), fixed number of steps": unrolled(last=8) | {"deq.max_steps_jitter": 0},
    "Unroll of all steps": unrolled(),
    "JacobianFree, Anderson": solved("jacobian_free", "anderson"),
    "Neumann(2), Anderson": solved("neumann", "anderson", terms=2),
    "PhantomGradient, Anderson": solved("phantom", "anderson"),
    "Implicit, Anderson": solved("implicit", "anderson", "anderson"),
    "Implicit, Broyden": solved("implicit", "broyden"),
    "Implicit, Broyden and GMRES": solved("implicit", "broyden", "gmres"),
    "Implicit, Broyden, 100 evaluations": solved("implicit", "broyden") | HUNDRED,
    "Implicit, Broyden and GMRES, 100 evaluations": solved("implicit", "broyden", "gmres") | HUNDRED,
    "Reversible": solved("reversible", "picard"),
    "SHINE, Broyden": solved("shine", "broyden"),
}
"""Row -> changes to a config."""

_QUIET: Changes = {"train.eval_every": 0, "train.checkpoint_every": 10_000, "data.pictures": 0}

MAZE = _QUIET | {
    **{"data.size": 7, "data.test_sizes": (13,), "data.train_examples": 10_000},
    **{"data.valid_examples": 100, "data.test_examples": 100, "deq.solver_options": {}},
    **{"deq.max_steps": 24, "deq.max_steps_jitter": 16, "deq.eval_max_steps": 150},
    **{"train.steps": 400, "optimizer.learning_rate": 2e-3, "optimizer.warmup_steps": 40},
}
SUDOKU = _QUIET | {
    **{"data.valid_examples": 100, "data.test_examples": 200, "data.eval_batch_size": 200},
    **{"deq.max_steps": 20, "deq.max_steps_jitter": 14, "deq.eval_max_steps": 150},
    **{"train.steps": 400, "optimizer.learning_rate": 1e-3},
}
BITS = _QUIET | {"data.test_sizes": (64, 128, 256, 512), "data.valid_examples": 100, "data.test_examples": 100}
FEED_FORWARD: Changes = {
    **{"model.initial": "zero", "deq.max_steps": 1, "deq.max_steps_jitter": 0, "deq.eval_max_steps": 1},
    **{"deq.eval_unrolled": True, "deq.gradient_options": {"remat": False}},
}
"""One application of f from zero: explicit blocks, whose number is their depth."""
PREFIX_SUMS: dict[str, Changes] = {
    "10 to 30 steps": {},
    "10 steps": {"deq.max_steps": 10, "deq.max_steps_jitter": 0},
    "feed-forward, 16 blocks": FEED_FORWARD | {"model.blocks": 16, "model.width": 18},
}
THOUSAND: Changes = {"data.test_sizes": (512,), "data.test_examples": 1000}
LONG: Changes = {
    **{"data.test_sizes": (4096,), "data.test_examples": 100, "data.eval_batch_size": 4, "data.valid_examples": 4},
    "deq.eval_max_steps": 3000,
}
"""Batches of four: those of ten take 1.7 times as long a string, those of one 1.1 times."""
PARTS = ("long", *(f"long, part {number}" for number in range(2, 11)))
"""Evaluations of seed 0 on 1,000 strings of 4,096, which take more than an hour of a core, in parts of other strings each."""
ABLATION: dict[str, Changes] = {
    "1,200 steps instead of 400": {"train.steps": 1200},
    "1,200 steps, free steps 0 to 40 instead of 16": {"train.steps": 1200, "deq.max_steps": 48, "deq.max_steps_jitter": 40},
    "free steps 0 to 40 instead of 16": {"deq.max_steps": 48, "deq.max_steps_jitter": 40},
    "no free steps": {"deq.max_steps": 8, "deq.max_steps_jitter": 0},
    "start at zero": {"model.initial": "zero"},
    "width 48 instead of 32": {"model.width": 48},
    "noise 0.1 in every step": unrolled(last=8, noise=0.1),
    "Jacobian loss": {"deq.jacobian_weight": 0.5, "deq.jacobian_frequency": 0.3},
    "consistency loss": {"deq.consistency_weight": 1.0, "deq.consistency_steps": (1, 2, 4, 7)},
}
"""Changes to Unroll(last=8) on mazes."""
TWO_STARTS: dict[str, Changes] = {"two starts": {"eval.restarts": 2, "model.initial": "normal"}}
"""Evaluation of path independence."""
FEW: Changes = {"data.valid_examples": 20, "data.test_examples": 100}
TWICE: dict[str, Changes] = {
    "plain": {"deq.solver_options": {}},
    "two starts": TWO_STARTS["two starts"] | FEW,
    "plain, two starts": TWO_STARTS["two starts"] | FEW | {"deq.solver_options": {}},
}
"""Evaluations of larger mazes: by plain iteration instead of relaxed, and of path independence."""
STATES: dict[str, tuple[str, str]] = {
    "A5, 4 symbols": ("a5", ""),
    "A5, 8 symbols": ("a5_8", "A5, 4 symbols"),
    "A5, 16 symbols": ("a5_16", "A5, 8 symbols"),
    "A5, 32 symbols": ("a5_32", "A5, 16 symbols"),
    "A5, Transformer, 4 symbols": ("transformer", ""),
    "A5, Transformer, 8 symbols": ("transformer_8", "A5, Transformer, 4 symbols"),
    "A5, Transformer, 16 symbols": ("transformer_16", "A5, Transformer, 8 symbols"),
    "S5, 4 symbols": ("s5", ""),
    "S5, 8 symbols": ("s5_8", "S5, 4 symbols"),
    "S5, 16 symbols": ("s5_16", "S5, 8 symbols"),
    "S5, 32 symbols": ("s5_32", "S5, 16 symbols"),
}
"""Row -> variant of configs/state_tracking.py, and the row from whose weights it starts."""

BOARDS = {"4 x 4": "four", "4 x 4, two levels": "four_trm", "6 x 6": "six", "9 x 9": "nine"}
"""Row -> variant of configs/sudoku.py."""
SEGMENTS: dict[str, Changes] = {f"segments {count}": {"loss.eval_segments": count} for count in (1, 2, 4)}
"""Evaluations of boards by fewer segments than in training."""
NINE: dict[str, Changes] = {
    "sweep": {"eval.max_steps_sweep": (10, 20, 50, 100, 200, 500), "deq.eval_max_steps": 1000},
    "restarts": {"eval.restarts": 4},
    "no guess": {"data.grades": (0, 0)},
    "1 to 3 guesses": {"data.grades": (1, 3)},
    "4 guesses and more": {"data.grades": (4, 10_000)},
}
"""Evaluations of boards of 9 x 9: by longer iteration, from several starts, by grade."""

FURTHER: dict[str, Changes] = {
    "sweep": {"eval.max_steps_sweep": (5, 10, 20, 40, 80)},
    "restarts": {"eval.restarts": 4},
}
"""Evaluations by longer iteration, and from several starts."""


def runs() -> Iterator[Run]:
    """All runs, in order of value."""
    for seed in range(3):
        for name, changes in GRADIENTS.items():
            more = FURTHER if name == "Unroll(last=8)" else {}
            mazes = more | (TWO_STARTS if more else {})
            yield Run("gradients, mazes", name, "configs/maze.py", MAZE | changes, seed, mazes)
            yield Run("gradients, sudoku", name, "configs/sudoku.py:four", SUDOKU | changes, seed, more)
    for seed in range(3):
        for name, changes in PREFIX_SUMS.items():
            parts = {part: LONG | {"data.seed": number} for number, part in enumerate(PARTS[: 1 if seed else None])}
            more = {"thousand": THOUSAND} | parts if name == "10 to 30 steps" else {}
            yield Run("prefix sums", name, "configs/prefix_sums.py", BITS | changes, seed, more)
    for seed in range(3):
        yield Run("mazes of twice the side", "configs/maze.py", "configs/maze.py", {}, seed, TWICE)
    for seed in range(3):
        made: dict[str, Run] = {}
        for name, (variant, start) in STATES.items():
            made[name] = Run("state tracking", name, f"configs/state_tracking.py:{variant}", {}, seed, start=made.get(start))
            yield made[name]
    for seed in range(3):
        for side, variant in BOARDS.items():
            more = {"9 x 9": NINE, "4 x 4, two levels": SEGMENTS}.get(side, {})
            yield Run("boards", side, f"configs/sudoku.py:{variant}", _QUIET, seed, more)
    for seed in range(3):
        for name, changes in ABLATION.items():
            yield Run("ablation, mazes", name, "configs/maze.py", MAZE | unrolled(last=8) | changes, seed, TWO_STARTS)


def program(run: Run, evaluation: str = "", start: str = "") -> str:
    """The fingerprint of what a run, with the one it starts from, or a further evaluation of its weights computes.

    `start`: the fingerprint of the run it starts from, if known.
    """
    if evaluation:
        return training.fingerprint(training.resolved(run.config, run.everything() | run.evaluations[evaluation]), "eval")
    own = training.fingerprint(training.resolved(run.config, run.everything()), "train", "eval")
    return own if run.start is None else hashlib.sha256(f"{start or program(run.start)}{own}".encode()).hexdigest()


def changed(results: records.Records, chosen: Iterable[Run]) -> Iterator[str]:
    """The keys of results that the code would make otherwise today, from other weights or by another program."""
    known: dict[str, str] = {}
    for run in chosen:
        trained = False
        if run.key() in results:
            known[run.key()] = program(run, start=known.get(run.start.key(), "") if run.start else "")
            trained = results[run.key()].get("program") != known[run.key()]
        if trained:
            yield run.key()
        for evaluation in run.evaluations:
            key = run.key(evaluation)
            if key in results and (trained or results[key].get("program") != program(run, evaluation)):
                yield key


def perform(run: Run, folder: Path) -> None:
    """Train, unless the result is there."""
    from deq_flax.config import make_task, phases_of, to_dict
    from deq_flax.errors import DivergedError
    from deq_flax.train.loop import train

    workdir, file = folder / run.stem, folder / "results" / f"{run.stem}.json"
    if file.exists():
        return
    weights, before = {}, ""
    if run.start:
        earlier = file.with_name(f"{run.start.stem}.json")
        if not earlier.exists():
            print(f"== {run.stem} waits for {run.start.stem}", flush=True)
            return
        weights = {"checkpoint.init_from": str(folder / run.start.stem)}
        before = json.loads(earlier.read_text(encoding="utf-8")).get("program", "")
    print(f"== {run.stem}", flush=True)
    config, start = training.resolved(run.config, run.everything() | weights), process_time()
    task = make_task(config)
    record = to_dict(replace(config, model=task.model_options))
    parts = {name: getattr(config, name) for name in ("optimizer", "train", "mesh", "checkpoint")}
    try:
        result = train(task, workdir=workdir, config=record, phases=phases_of(config), **parts)
    except DivergedError as error:  # a result too
        _write(file, {"run": asdict(run), "failed": str(error)})
        return
    if result.interrupted:
        raise SystemExit("stopped: the same command continues")
    found = {"run": asdict(run), "program": program(run, start=before), "metrics": result.metrics}
    found |= {"seconds": process_time() - start, "last_steps": last_steps(workdir)}
    _write(file, found | step_costs(config, workdir))


def evaluate(run: Run, folder: Path) -> None:
    """Make the further evaluations of a run that has not failed, unless their results are there."""
    from deq_flax.config import make_task, phases_of
    from deq_flax.train.evaluate import evaluate_checkpoint

    trained = folder / "results" / f"{run.stem}.json"
    if not trained.exists() or "failed" in json.loads(trained.read_text(encoding="utf-8")):
        return
    for name, changes in run.evaluations.items():
        file = trained.with_name(f"{run.key(name)}.json")
        if file.exists():
            continue
        print(f"== {file.stem}", flush=True)
        config, start = training.resolved(run.config, run.everything() | changes), process_time()
        result = evaluate_checkpoint(
            make_task(config),
            folder / run.stem,
            phases=phases_of(config),
            mesh=config.mesh,
            options=config.eval,
            seed=run.seed,
        )
        found = {"run": asdict(run), "evaluation": name, "program": program(run, name)}
        found |= {"metrics": result.metrics, "sweep": result.sweep}
        _write(file, found | {"seconds": process_time() - start})


def step_costs(config: Any, workdir: Path) -> dict[str, float]:
    """Parameters, seconds of a training step at the trained weights, evaluations of f in it, and its temporary megabytes."""
    import jax

    from benchmarks.memory import peak
    from deq_flax.checkpoints.checkpoints import Checkpoints
    from deq_flax.devices.mesh import put_batch

    it = training.Training(config)
    with Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints:
        it.run.restore(checkpoints, "")
    compiled = it.traced().lower().compile()
    batches, state, laps, evaluations = it.task.train_batches(0), it.run.state, [], []
    for number in range(TIMED_STEPS + 1):
        batch = put_batch(it.run.devices, next(batches), it.task.batch_size)
        start = process_time()
        state, metrics = jax.block_until_ready(compiled(state, batch, it.phases.scalars(number), jax.numpy.int32(number)))
        laps.append(process_time() - start)
        evaluations.append(float(metrics["forward_nfe"].total / metrics["forward_nfe"].count))
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        "seconds_a_step": sum(laps[1:]) / TIMED_STEPS,
        "evaluations_a_step": sum(evaluations[1:]) / TIMED_STEPS,
        "megabytes": peak(compiled)[1],
    }


def last_steps(workdir: Path) -> dict[str, Any]:
    """Means over the last steps of training, from a run's log."""
    from deq_flax.run_log.metrics_file import read_metrics

    return next(line for line in reversed(read_metrics(workdir)) if line["split"] == "train")


def take_over(folder: Path, kept: Path) -> None:
    """Take the results in a folder over into a file of them, in place of earlier ones of the same runs."""
    files = sorted((folder / "results").glob("*.json"))
    records.add(kept, [{"key": file.stem} | json.loads(file.read_text(encoding="utf-8")) for file in files])


def _write(file: Path, found: Mapping[str, Any]) -> None:
    from deq_flax.run_log.results import replace_file, to_json

    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, f"{to_json(found, indent=1)}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="holds a workdir for each run, and results")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="runs whose 'GROUP: NAME, seed SEED' contains one of these texts"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later than that")
    parser.add_argument("--list", action="store_true", help="list the runs; x: it has its result")
    parser.add_argument("--changed", action="store_true", help="list kept results that are of another program or other data")
    parser.add_argument("--write", action="store_true", help="write tables and figures to docs/")
    arguments = parser.parse_args()
    if arguments.write:
        take_over(arguments.folder, RESULTS)
        reasoning_report.write(records.read(RESULTS))
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(arguments.folder / "cache"))
    start = perf_counter()
    chosen = [run for text in arguments.only for run in runs() if text in f"{run.group}: {run.name}, seed {run.seed}"]
    if arguments.list:
        for run in chosen:
            print("x " * (arguments.folder / "results" / f"{run.stem}.json").exists() + run.stem)
        return
    if arguments.changed:
        for key in changed(records.read(RESULTS), chosen):
            print(key, flush=True)
        return
    for make in (perform, evaluate):
        for run in chosen:
            if perf_counter() - start < 60 * arguments.minutes:
                make(run, arguments.folder)
                jax.clear_caches()


if __name__ == "__main__":
    main()
