"""The tutorial runs, cell by cell, and its claims hold."""

import json
import pathlib

import pytest


@pytest.mark.slow
def test_every_cell_of_the_tutorial_runs():
    matplotlib = pytest.importorskip("matplotlib", reason="the extra 'docs' is not installed")
    matplotlib.use("Agg")
    notebook = json.loads((pathlib.Path(__file__).parent.parent / "docs" / "tutorial.ipynb").read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("range(400)", "range(60)")  # enough to see that it learns
            exec(compile(source, "tutorial", "exec"), names)
    assert names["solution"].stats.converged.all()
    assert abs(names["slope"] - names["difference"]) < 0.02 * abs(names["difference"])
    for _, accuracies, evaluations in (history for _, history in names["runs"].values()):
        assert accuracies[0] < 0.8 and accuracies.max() > 0.9 and evaluations.min() > 1
    _, accuracies, _ = names["runs"]["spectral norm 0.97"][1]
    assert accuracies[-20:].mean() > 0.9  # training of the unbounded layer is unsteady, as the text says
    evaluations = {name: history[2][-20:].mean() for name, (_, history) in names["runs"].items()}
    assert evaluations["spectral norm 0.97"] < 0.7 * evaluations["unbounded"]
