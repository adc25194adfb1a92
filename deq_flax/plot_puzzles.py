"""Figures of how well puzzles are solved: the share of exact answers against applications of f, and against size."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deq_flax.errors import UserError
from deq_flax.untrusted.files import read_json

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Label -> points (x, share of puzzles that are exactly right)."""


def read_evaluation(workdir: Path) -> Mapping[str, Any] | None:
    """The last evaluation of a run on puzzles, its eval.json; None: there is none, or the run is of another task.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / "eval.json"
    if not path.exists():
        return None
    try:
        evaluation = read_json(path)
        if evaluation["config"]["task"] != "reasoning":
            return None
        rows = [evaluation["metrics"]["test"], *evaluation["sweep"]]
        for row in rows:
            by_size(row, 0)
        int(evaluation["config"]["data"]["size"])
        return evaluation
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no evaluation of puzzles: run --mode eval again, or delete it") from error


def by_size(metrics: Mapping[str, Any], trained: int, metric: str = "exact_match") -> dict[int, float]:
    """A metric at every size in an evaluation; `trained`: the size whose metric has no number at its end."""
    found = {trained: float(metrics[metric])}
    for key, value in metrics.items():
        base, _, size = key.rpartition("_")
        if base == metric and size.isdigit():
            found[int(size)] = float(value)
    return found


def against_limit(evaluation: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Curves of exact answers on the test split against the limit on applications of f, one for each size; {}: no sweep."""
    config = evaluation["config"]
    limit = config["deq"]["eval_max_steps"] or config["deq"]["max_steps"]
    sweep = [(row["max_steps"], row) for row in evaluation["sweep"] if row["split"] == "test"]
    rows = dict([*sweep, (limit, evaluation["metrics"]["test"])]) if sweep else {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for steps, row in sorted(rows.items()):
        for size, share in by_size(row, config["data"]["size"]).items():
            curves.setdefault(f"size {size}", []).append((steps, share))
    return curves


def draw_exact(pyplot: Any, curves: Curves, *, xlabel: str, trained: Iterable[float] = ()) -> Any:
    """A figure with a curve for each label; `trained`: places on the axis that training knew, as dotted lines."""
    figure, axis = pyplot.subplots(figsize=(5.5, 3.4), layout="constrained")
    for place in trained:
        axis.axvline(place, color="#8a8a8a", ls=":", lw=1.2)
    for label, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.6, label=label)
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel="exact match", ylim=(-0.03, 1.03))
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def draw_puzzles(pyplot: Any, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation by name: `iterations` if it has a sweep over limits, `sizes` if it has several sizes."""
    figures, size = {}, evaluation["config"]["data"]["size"]
    if curves := against_limit(evaluation):
        figures["iterations"] = draw_exact(pyplot, curves, xlabel="limit on applications of f")
    shares = by_size(evaluation["metrics"]["test"], size)
    if len(shares) > 1:
        points = {"test": sorted(shares.items())}
        figures["sizes"] = draw_exact(pyplot, points, xlabel="size of the puzzles", trained=[size])
    return figures
