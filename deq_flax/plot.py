"""Plot a run: curves of its metrics; of its last evaluation, the score against the limit on applications of f, and for puzzles
against size; for image models, predictions of the best checkpoint on validation images.

  python -m deq_flax.plot --workdir runs/digits [--config.data.path=PATH]

PNGs are written to WORKDIR/plots. The curves need metrics.jsonl alone; predictions, confusion matrix and residuals by branch
need the checkpoint and the data too. Those of an evaluation need eval.json, the last one: against the limit if it had
--config.eval.max_steps_sweep, against size if it had --config.data.test_sizes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from deq_flax import cli
from deq_flax.config import make_task
from deq_flax.config_files import run_config
from deq_flax.errors import UserError
from deq_flax.plot_evaluation import draw_evaluation, read_evaluation
from deq_flax.plot_model import draw_model
from deq_flax.run_log.metrics_file import Lines, read_metrics
from deq_flax.task import HasPictures

_FLAGS = flags.FlagValues()  # not the global ones, so that this module can be imported beside other commands
_CONFIG = cli.config_flag(_FLAGS)
_WORKDIR = flags.DEFINE_string("workdir", None, "the workdir of the run", flag_values=_FLAGS)
_MODEL = flags.DEFINE_bool("model", True, "--nomodel: the curves only, without the checkpoint and the data", flag_values=_FLAGS)

PANELS = {
    "curves": (
        ("loss", "linear"),
        ("ppl", "log"),
        ("accuracy", "linear"),
        ("miou", "linear"),
        ("exact_match", "linear"),
        ("cell_accuracy", "linear"),
    ),
    "solver": (
        ("forward_nfe", "linear"),
        ("forward_residual", "log"),
        ("backward_nfe", "linear"),
        ("backward_residual", "log"),
        ("jacobian_loss", "linear"),
        ("consistency_loss", "log"),
        ("grad_norm", "log"),
    ),
}
"""File name -> (metric, scale) of its panels; those whose metric the run has are drawn."""
COLORS = {"train": "#8a8a8a", "valid": "#1f6fb4", "test": "#d1602b"}


def main() -> dict[str, Any]:
    """Run the command; returns its result."""
    workdir = Path(_WORKDIR.value or "")
    pyplot = _pyplot()
    lines = read_metrics(workdir)
    folder = workdir / "plots"
    drawn: list[str] = []
    try:
        folder.mkdir(exist_ok=True)
        for name, panels in PANELS.items():
            drawn.append(_save(draw_panels(pyplot, lines, panels), folder / f"{name}.png"))
        evaluation = read_evaluation(workdir)
        if evaluation is not None:
            drawn += [_save(figure, folder / f"{name}.png") for name, figure in draw_evaluation(pyplot, evaluation).items()]
        if _MODEL.value:
            drawn += [_save(picture, folder / f"{name}.png") for name, picture in _draw_model(pyplot, workdir).items()]
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return {"files": drawn}


def draw_panels(pyplot: Any, lines: Lines, panels: Sequence[tuple[str, str]]) -> Any:
    """A Matplotlib figure with a panel for each metric that the lines have, one curve a split."""
    present = [(name, scale) for name, scale in panels if any(line.get(name) is not None for line in lines)] or [panels[0]]
    columns = min(2, len(present))
    rows = -(-len(present) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.5 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(present) :]:
        axis.set_visible(False)
    for axis, (name, scale) in zip(axes.flat, present, strict=False):
        for split, color in COLORS.items():
            points = [(line["step"], line[name]) for line in lines if line["split"] == split and line.get(name) is not None]
            if points:
                style = {"lw": 1.2} if split == "train" else {"lw": 1.6, "marker": "o", "ms": 4}
                axis.plot(*zip(*points, strict=True), color=color, label=split, **style)
        if scale == "log" and all(line.get(name) is None or line[name] > 0 for line in lines):
            axis.set_yscale("log")
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return figure


def _draw_model(pyplot: Any, workdir: Path) -> dict[str, Any]:
    """Pictures of the model by name; none if its task has no pictures."""
    config = cli.resolved(_FLAGS)
    task = make_task(config)
    return draw_model(pyplot, task, config.deq, workdir) if isinstance(task, HasPictures) else {}


def _save(picture: Any, path: Path) -> str:
    """Write a Matplotlib figure, or an image, (H, W, 3) uint8; returns the file's name, which is printed too."""
    if hasattr(picture, "savefig"):
        picture.savefig(path, dpi=130)
        picture.clear()
    else:
        from PIL import Image

        Image.fromarray(picture).save(path)
    print(path)
    return str(path)


def _pyplot() -> Any:
    """Matplotlib's pyplot, drawing to files. UserError: Matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need Matplotlib: pip install -r requirements-plot.txt") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    cli.run(main, required=("workdir",), of_run=("workdir", run_config), flag_values=_FLAGS)
