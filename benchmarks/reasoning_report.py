"""Tables and figures of docs/reasoning.md from the results of `benchmarks.reasoning`, by key: NAME or NAME.EVALUATION."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks import tables, training
from benchmarks.records import Records

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Name of a run -> its results, one for each seed; in the order of the table."""


def read(records: Records, group: str, evaluation: str = "") -> dict[str, list[Mapping[str, Any]]]:
    """The results of a group by run; `evaluation`: those of that further evaluation, not those at the end of training."""
    from benchmarks.reasoning import runs

    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs():
        key = run.key(evaluation)
        if run.group == group and key in records:
            found.setdefault(run.name, []).append(records[key])
    return found


def numbers(results: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """A metric of the test split, of every seed; diverged runs and metrics that are not there give none."""
    found = [result.get("metrics", {}).get("test", {}).get(metric) for result in results]
    return [value for value in found if value is not None]


def percent(value: float) -> str:
    """A share: no rounding makes it 0% or 100%."""
    digits = 0 if value in (0, 1) else 1 if 0.001 <= value <= 0.999 else 2
    return f"{100 * value:.{digits}f}%"


def costs(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells: evaluations of f, seconds and megabytes of a training step."""
    some = [result for result in results if "megabytes" in result]
    forms = {"evaluations_a_step": "{:.1f}", "seconds_a_step": "{:.2f}", "megabytes": "{:.1f}"}
    return [tables.spread([result[name] for result in some], form.format) for name, form in forms.items()]


def gradients(rows: Rows, *, sizes: Sequence[str]) -> str:
    """Scores at each size, a suffix of metrics, with residual and share converged, and the costs of a step."""
    head = ["gradient, solver"]
    for size in sizes:
        head += [f"exact{size}", f"residual{size}", f"converged{size}"]
    body = []
    for name, results in rows.items():
        line = [name]
        for size in sizes:
            line += [
                tables.spread(numbers(results, f"exact_match{size}"), percent),
                tables.spread(numbers(results, f"residual{size}"), "{:.0e}".format),
                tables.spread(numbers(results, f"converged{size}"), percent),
            ]
        body.append([*line, *costs(results)])
    return tables.markdown([*head, "evaluations a step", "s a step", "MB"], body) + seeds(rows)


def in_code(rows: Rows) -> Rows:
    """The rows with their names as code."""
    return {f"`{name}`": results for name, results in rows.items()}


def solves(records: Records) -> str:
    """How far the two solves of `Implicit` got in training: means over the last steps, of the largest of each batch."""
    forms = {"forward_nfe": "{:.0f}", "forward_residual": "{:.0e}", "backward_nfe": "{:.0f}", "backward_residual": "{:.0e}"}
    found, body = {}, []
    for puzzle in ("mazes", "sudoku"):
        rows = read(records, f"gradients, {puzzle}")
        for name in (name for name in rows if name.startswith("Implicit")):
            found[puzzle, name] = rows[name]
            last = [result["last_steps"] for result in rows[name] if "last_steps" in result]
            cells = [tables.spread([row[metric] for row in last], form.format) for metric, form in forms.items()]
            body.append([puzzle, f"`{name}`", *cells, tables.spread(numbers(rows[name], "exact_match"), percent)])
    head = ["puzzles", "gradient, solver", "evaluations", "residual", "products of the adjoint", "its residual", "exact"]
    return tables.markdown(head, body) + seeds(found)


def mazes(records: Records) -> str:
    rows = in_code(read(records, "gradients, mazes"))
    return gradients(rows, sizes=["", "_13"]).replace("_13", ", side 13")


def sudoku(records: Records) -> str:
    rows = in_code(read(records, "gradients, sudoku"))
    return gradients(rows, sizes=[""])


def boards(records: Records) -> str:
    rows, body = read(records, "boards"), []
    forms = {
        "exact_match": percent,
        "cell_accuracy": percent,
        "converged": percent,
        "steps": "{:.0f}".format,
        "halted": percent,
    }
    for name, results in rows.items():
        scored = [result for result in results if "metrics" in result]
        line = [name, tables.spread([result["parameters"] for result in scored], "{:,.0f}".format)]
        line += [tables.spread(numbers(scored, metric), form) for metric, form in forms.items()]
        worked = [result["last_steps"]["segments"] for result in scored if numbers([result], "halted")]
        line += [tables.spread(worked, "{:.2f}".format)]
        body.append([*line, tables.spread([result["seconds"] / 60 for result in scored], "{:.0f}".format)])
    head = ["board", "parameters", "exact", "cells right", "converged", "steps", "halted", "segments in training"]
    return tables.markdown([*head, "minutes of a core"], body) + seeds(rows)


def seeds(rows: Rows) -> str:
    """A line on the seeds of the rows."""
    used = sorted({result["run"]["seed"] for results in rows.values() for result in results})
    return f"\nSeeds {', '.join(map(str, used))}; with several, mean (least to largest).\n" if used else ""


def prefix_sums(records: Records) -> str:
    from benchmarks.reasoning import PARTS

    rows, thousand = (read(records, "prefix sums", evaluation) for evaluation in ("", "thousand"))
    parts = [read(records, "prefix sums", part) for part in PARTS]
    body = []
    for name, results in rows.items():
        scored = [result for result in results if "parameters" in result]
        seconds = [result["seconds_a_step"] * steps_of(result["run"]) for result in scored]
        line = [name, tables.spread([result["parameters"] for result in scored], "{:,.0f}".format)]
        line += [tables.spread(seconds, "{:.0f}".format)]
        line += [tables.spread(numbers(results, f"exact_match{size}"), percent) for size in ("", "_64", "_128", "_256", "_512")]
        line += [
            tables.spread(numbers(results, f"{metric}_512"), form)
            for metric, form in (("steps", "{:.0f}".format), ("converged", percent))
        ]
        line += [tables.spread(numbers(thousand.get(name, []), "exact_match_512"), percent)]
        long = [result for part in parts for result in part.get(name, [])]
        line += [tables.spread(numbers(long, "exact_match_4096"), percent)]
        body.append(line)
    head = ["model", "parameters", "s of training", "32", "64", "128", "256", "512", "steps, 512", "converged, 512"]
    head += ["1,000 of 512", "4,096, by hundreds: ten of seed 0, one of each other"]
    return tables.markdown(head, body) + seeds(rows)


def steps_of(run: Mapping[str, Any]) -> int:
    """The training steps of a run."""
    return training.resolved(run["config"], run["changes"]).train.steps


def twice_the_side(records: Records) -> str:
    group, body = "mazes of twice the side", []
    for words, evaluation, starts in (("relaxed by 0.5", "", "two starts"), ("plain", "plain", "plain, two starts")):
        started = read(records, group, starts)
        for name, results in read(records, group, evaluation).items():
            shares = [tables.spread(numbers(results, f"exact_match{size}"), percent) for size in ("", "_21")]
            forms = {"residual_21": "{:.0e}".format, "converged_21": percent, "steps_21": "{:.0f}".format}
            cells = [tables.spread(numbers(results, metric), form) for metric, form in forms.items()]
            cells += [tables.spread(numbers(started.get(name, []), f"agreement{size}"), percent) for size in ("", "_21")]
            body.append([words, *shares, *cells])
    head = ["iteration of evaluation", "exact, side 11", "exact, side 21", "residual, 21", "converged, 21", "steps, 21"]
    return tables.markdown([*head, "agreement, 11", "agreement, 21"], body) + seeds(read(records, group))


def states(records: Records) -> str:
    from deq_flax.plot_evaluation import by_size

    rows, lengths, body = read(records, "state tracking"), (4, 8, 16, 32, 64, 128, 256), []
    for name, results in rows.items():
        line = [name, tables.spread([result["parameters"] for result in results if "parameters" in result], "{:,.0f}".format)]
        scored = [result for result in results if "metrics" in result]
        for metric, form in (("exact_match", percent), ("steps", "{:.0f}".format)):
            found = [
                by_size(each["metrics"]["test"], training.resolved(each["run"]["config"]).data.size, metric) for each in scored
            ]
            line += [tables.spread([shares[length] for shares in found if length in shares], form) for length in lengths]
        body.append(line)
    head = ["model, symbols trained on", "parameters", *map(str, lengths), *(f"steps, {length}" for length in lengths)]
    return tables.markdown(head, body) + seeds(rows)


def ablation(records: Records) -> str:
    rows = read(records, "ablation, mazes")
    name, group, started = "Unroll(last=8)", "gradients, mazes", read(records, "ablation, mazes", "two starts")
    base = f"as in the table above, `{name}`"
    rows = {base: read(records, group).get(name, [])} | rows
    started[base] = read(records, group, "two starts").get(name, [])
    forms = {"exact_match": percent, "residual": "{:.0e}".format, "converged": percent}
    body = []
    for name, results in rows.items():
        line = [name]
        for size in ("", "_13"):
            line += [tables.spread(numbers(results, f"{metric}{size}"), form) for metric, form in forms.items()]
            line += [tables.spread(numbers(started.get(name, []), f"agreement{size}"), percent)]
        body.append([*line, costs(results)[1]])
    head = ["exact", "residual", "converged", "agreement"]
    head = ["training", *head, *(f"{word}, side 13" for word in head), "s a step"]
    return tables.markdown(head, body) + seeds(rows)


def longer(records: Records) -> str:
    """What longer iteration and several starts gain, and what they cost."""
    body: list[list[str]] = []
    rows: dict[str, list[dict[str, Any]]] = {}
    for puzzle, sizes in (("mazes", {"7": "", "13": "_13"}), ("sudoku", {"4": ""})):
        swept = read(records, f"gradients, {puzzle}", "sweep")
        restarted = read(records, f"gradients, {puzzle}", "restarts").get("Unroll(last=8)", [])
        rows[puzzle] = swept.get("Unroll(last=8)", [])
        for size, suffix in sizes.items():
            for limit, tested in by_limit(rows[puzzle]).items():
                body.append([f"{puzzle}, {size}", f"limit {limit}", *_scores(tested, suffix)])
            tested = [result["metrics"]["test"] for result in restarted]
            body += [[f"{puzzle}, {size}", *cells] for cells in _of_starts("", tested, suffix)]
    head = ["puzzles, side", "evaluation", "exact match", "residual", "steps", "evaluations"]
    return tables.markdown(head, body) + seeds(rows)


def nine(records: Records) -> str:
    """Boards of 9 x 9 by the limit on applications of f, from several starts, and by grade."""
    body, rows = [], read(records, "boards", "sweep")
    for limit, tested in by_limit(rows.get("9 x 9", []), 1000).items():
        body.append([f"limit {limit}", *_scores(tested, "")])
    restarted = [result["metrics"]["test"] for result in read(records, "boards", "restarts").get("9 x 9", [])]
    body += _of_starts("limit 200, ", restarted, "")
    for name, label in GRADES.items():
        tested = [result["metrics"]["test"] for result in read(records, "boards", name).get("9 x 9", [])]
        if tested:
            body.append([label, *_scores(tested, "")])
    head = ["evaluation", "exact match", "residual", "steps", "evaluations"]
    return tables.markdown(head, body) + seeds(rows)


def by_limit(results: Sequence[Mapping[str, Any]], most: int = 150) -> dict[int, list[Mapping[str, Any]]]:
    """The metrics of the test split of every seed by the limit of a sweep; `most`: that of evaluation itself."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for result in results:
        whole = {"split": "test", "max_steps": most} | result["metrics"]["test"]
        for row in (*result["sweep"], whole):
            if row["split"] == "test":
                found.setdefault(row["max_steps"], []).append(row)
    return found


def _scores(tested: Sequence[Mapping[str, Any]], size: str) -> list[str]:
    """Cells: exact match, residual and steps of the returned iterate, and evaluations of f until a batch has settled."""
    forms = {"exact_match": percent, "residual": "{:.0e}".format, "steps": "{:.0f}".format, "forward_nfe": "{:.0f}".format}
    return [tables.spread([row[f"{metric}{size}"] for row in tested], form) for metric, form in forms.items()]


def _of_starts(words: str, tested: Sequence[Mapping[str, Any]], size: str) -> list[list[str]]:
    """Rows on four starts; the answer of most of them is none of one residual, and costs as much."""
    if not tested:
        return []
    best = _scores(tested, size)
    vote = tables.spread([row[f"exact_match_vote{size}"] for row in tested], percent)
    return [[f"{words}4 starts, lowest residual", *best], [f"{words}4 starts, vote", vote, "-", "-", best[-1]]]


def figures(records: Records) -> dict[str, Any]:
    """The figures by file name in docs/figures: exact answers against size, and against applications of f."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from deq_flax.plot_evaluation import by_size, draw_scores

    found: dict[str, Any] = {}
    if complete(records, "prefix sums"):
        sizes = {}
        for name, results in read(records, "prefix sums").items():
            shares = [by_size(result["metrics"]["test"], 32) for result in results if "metrics" in result]
            sizes[name] = [(size, mean(share[size] for share in shares)) for size in sorted(shares[0])] if shares else []
        found["prefix_sums_by_size"] = draw_scores(pyplot, sizes, xlabel="bits", trained=[32])
    if complete(records, "gradients, mazes"):
        limits = by_limit(read(records, "gradients, mazes", "sweep")["Unroll(last=8)"])
        shown = {
            f"side {size}": [(limit, mean(row[f"exact_match{suffix}"] for row in tested)) for limit, tested in limits.items()]
            for size, suffix in (("7", ""), ("13", "_13"))
        }
        found["mazes_by_iterations"] = draw_scores(pyplot, shown, xlabel="limit on applications of f")
    return found


GRADES = {
    "no guess": "limit 200, boards that singles solve",
    "1 to 3 guesses": "limit 200, boards of 1 to 3 guesses",
    "4 guesses and more": "limit 200, boards of 4 guesses or more",
}
"""A further evaluation of boards of 9 x 9 -> its row."""

TABLES: dict[str, tuple[Callable[[Records], str], tuple[str, ...]]] = {
    "gradients on mazes": (mazes, ("gradients, mazes",)),
    "gradients on sudoku": (sudoku, ("gradients, sudoku",)),
    "implicit solves": (solves, ("gradients, mazes", "gradients, sudoku")),
    "boards": (boards, ("boards",)),
    "boards of 9 x 9": (nine, ("boards",)),
    "prefix sums": (prefix_sums, ("prefix sums",)),
    "ablation of mazes": (ablation, ("ablation, mazes", "gradients, mazes")),
    "mazes of twice the side": (twice_the_side, ("mazes of twice the side",)),
    "state tracking": (states, ("state tracking",)),
    "longer iteration": (longer, ("gradients, mazes", "gradients, sudoku")),
}
"""Name of the place in docs/reasoning.md -> its table, and the groups of runs that it is of."""


def complete(records: Records, group: str) -> bool:
    """Whether all results of a group are there."""
    from benchmarks.reasoning import Run, runs

    def there(run: Run) -> bool:
        result = records.get(run.key())
        return result is not None and ("failed" in result or all(run.key(name) in records for name in run.evaluations))

    return all(there(run) for run in runs() if run.group == group)


def made(records: Records) -> dict[str, str]:
    """The tables whose results are all there, by place."""
    return {name: make(records) for name, (make, groups) in TABLES.items() if all(complete(records, group) for group in groups)}


def write(records: Records) -> None:
    """Write the tables and draw the figures whose results are all there."""
    for name, text in made(records).items():
        tables.publish(name, text, str(tables.DOCS / "reasoning.md"))
    for name, figure in figures(records).items():
        figure.savefig(tables.DOCS / "figures" / f"{name}.png", dpi=110)
