"""Figures of an evaluation: the score against the limit on applications of f, and that of puzzles against their size."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deq_flax.errors import UserError
from deq_flax.untrusted.files import read_json

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Label -> points (x, score)."""

SCORES = {
    "language": ("ppl", "perplexity"),
    "classification": ("accuracy", "accuracy"),
    "segmentation": ("miou", "mean intersection over union"),
    "reasoning": ("exact_match", "exact match"),
}
"""Task -> the metric that its figures show, and the name of the axis. All are shares, but for the perplexity."""


def read_evaluation(workdir: Path) -> Mapping[str, Any] | None:
    """The last evaluation of a run, its eval.json; None: there is none.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / "eval.json"
    if not path.exists():
        return None
    try:
        evaluation = read_json(path)
        against_limit(evaluation)
        against_size(evaluation)
        return evaluation
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no evaluation: run --mode eval again, or delete it") from error


def by_size(metrics: Mapping[str, Any], trained: int, metric: str = "exact_match") -> dict[int, float]:
    """A metric at every size in an evaluation; `trained`: the size whose metric has no number at its end."""
    found = {trained: float(metrics[metric])}
    for key, value in metrics.items():
        base, _, size = key.rpartition("_")
        if base == metric and size.isdigit():
            found[int(size)] = float(value)
    return found


def against_limit(evaluation: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Curves of the score on the test split against the limit on applications of f; {}: the evaluation has no sweep.

    Of puzzles there is a curve for each size. A score that is not finite, as a perplexity may be, is left out.
    """
    config = evaluation["config"]
    metric, _ = SCORES[config["task"]]
    sweep = [(int(row["max_steps"]), row) for row in evaluation["sweep"] if row["split"] == "test"]
    if not sweep:
        return {}
    limit = config["deq"]["eval_max_steps"] or config["deq"]["max_steps"]
    curves: dict[str, list[tuple[float, float]]] = {}
    for steps, row in sorted(dict([*sweep, (limit, evaluation["metrics"]["test"])]).items()):
        if config["task"] == "reasoning":
            scores = {f"size {size}": share for size, share in by_size(row, config["data"]["size"], metric).items()}
        else:
            scores = {} if row[metric] is None else {"test": float(row[metric])}
        for label, score in scores.items():
            curves.setdefault(label, []).append((steps, score))
    return curves


def against_size(evaluation: Mapping[str, Any]) -> dict[int, float]:
    """The share of puzzles of the test split that are exactly right, by size; {}: of other tasks."""
    config = evaluation["config"]
    if config["task"] != "reasoning":
        return {}
    return by_size(evaluation["metrics"]["test"], int(config["data"]["size"]))


def draw_scores(
    pyplot: Any, curves: Curves, *, xlabel: str, ylabel: str = "exact match", share: bool = True, trained: Iterable[float] = ()
) -> Any:
    """A figure with a curve for each label.

    Args:
      share: the score is a share, from 0 to 1; otherwise it is a positive number.
      trained: places on the axis that training knew, as dotted lines.
    """
    figure, axis = pyplot.subplots(figsize=(5.5, 3.4), layout="constrained")
    for place in trained:
        axis.axvline(place, color="#8a8a8a", ls=":", lw=1.2)
    for label, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.6, label=label)
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axis.set_xscale("symlog", linthresh=1, linscale=0.3)  # a limit may be 0
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if share:
        axis.set_ylim(-0.03, 1.03)
        axis.yaxis.set_major_formatter("{x:.0%}")
    else:
        axis.set_yscale("log")
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter("{x:g}")
    axis.xaxis.set_minor_locator(pyplot.NullLocator())
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def draw_evaluation(pyplot: Any, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation by name: `iterations` if it has a sweep over limits, `sizes` if it has several sizes."""
    figures, task = {}, evaluation["config"]["task"]
    _, ylabel = SCORES[task]
    if curves := against_limit(evaluation):
        share = task != "language"
        figures["iterations"] = draw_scores(pyplot, curves, xlabel="limit on applications of f", ylabel=ylabel, share=share)
    sizes = against_size(evaluation)
    if len(sizes) > 1:
        trained = [evaluation["config"]["data"]["size"]]
        figures["sizes"] = draw_scores(
            pyplot, {"test": sorted(sizes.items())}, xlabel="size of the puzzles", ylabel=ylabel, trained=trained
        )
    return figures
