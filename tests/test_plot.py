"""The plot command."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from deq_flax import plot
from deq_flax.config import make_task, resolve, to_dict
from deq_flax.equilibrium import Anderson, fixed_point
from deq_flax.errors import UserError
from deq_flax.plot_model import branch_residuals, draw_confusion
from tests.commands import command
from tests.tasks.images import classification, write_labeled
from tests.test_configs import resolved

LINES = [
    {"step": 10, "split": "train", "loss": 3.0, "ppl": 20.1, "forward_nfe": 9.0, "forward_residual": 1e-3},
    {"step": 20, "split": "train", "loss": 2.0, "ppl": 7.4, "forward_nfe": 9.5, "forward_residual": None},
    {"step": 20, "split": "valid", "loss": 2.5, "ppl": 12.2},
]


def write_run(folder, lines=LINES):
    """Write the metrics and the config of a run on text, without checkpoints."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 30, "spl')
    (folder / "config.json").write_text(json.dumps(to_dict(resolved("wt103", "tiny"))))
    return folder


@pytest.mark.slow
def test_the_metrics_of_a_run_on_text_are_drawn(tmp_path):
    result = command("plot", "--workdir", str(write_run(tmp_path / "run")))
    assert result.returncode == 0, result.stderr
    for name in ("curves", "solver"):
        pixels = np.asarray(Image.open(tmp_path / "run" / "plots" / f"{name}.png").convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        assert str(tmp_path / "run" / "plots" / f"{name}.png") in result.stdout


def test_of_later_evaluations_the_test_split_is_drawn(tmp_path):
    """Their validation loss is on the curve already, and a sweep's rows have other limits."""
    head = {"step": 20, "mode": "eval"}
    test = head | {"split": "test", "loss": 2.6}
    folder = write_run(tmp_path / "run", [*LINES, head | {"split": "valid", "loss": 2.5}, test, test | {"max_steps": 4}])
    assert plot.read_metrics(folder) == [*LINES, test]


def test_each_split_is_a_line_in_the_panel_of_its_metric():
    pyplot = plot._pyplot()
    figure = plot.draw_panels(pyplot, LINES, plot.PANELS["curves"])
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == ["loss", "ppl"] and panels["ppl"].get_yscale() == "log"
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panels["loss"].get_lines()}
    assert drawn == {"train": [[10, 3.0], [20, 2.0]], "valid": [[20, 2.5]]}
    pyplot.close(figure)


def test_the_score_of_puzzles_is_drawn_beside_their_loss():
    pyplot = plot._pyplot()
    line = {"step": 10, "split": "valid", "loss": 1.0, "exact_match": 0.5, "cell_accuracy": 0.75, "exact_match_21": 0.25}
    figure = plot.draw_panels(pyplot, [line], plot.PANELS["curves"])
    drawn = {axis.get_title(): axis.get_lines()[0].get_xydata().tolist() for axis in figure.axes if axis.get_visible()}
    assert drawn == {"loss": [[10, 1.0]], "exact match": [[10, 0.5]], "cell accuracy": [[10, 0.75]]}
    pyplot.close(figure)


@pytest.mark.parametrize("case", ["no folder", "no metrics", "damaged"])
def test_user_errors_are_one_line(tmp_path, case):
    if case == "no metrics":
        (tmp_path / "metrics.jsonl").write_text("")
    elif case == "damaged":
        (tmp_path / "metrics.jsonl").write_text("no json\n")
    folder = tmp_path / "none" if case == "no folder" else tmp_path
    with pytest.raises(UserError) as error:
        plot.read_metrics(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_missing_matplotlib_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"requirements-plot\.txt"):
        plot._pyplot()


def test_the_confusion_matrix_is_shown_by_row():
    pyplot = plot._pyplot()
    figure = draw_confusion(pyplot, np.array([[3.0, 1.0], [0.0, 0.0]]), ("cat", "dog"))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25"]
    pyplot.close(figure)


@pytest.mark.slow
def test_the_residual_of_the_only_branch_is_that_of_the_state(tmp_path):
    task = make_task(resolve(classification(write_labeled(tmp_path))))
    model, solver = task.build_model(nnx.Rngs(0)), Anderson(max_steps=6)

    @jax.jit
    def both(batch):
        f, z0 = task.equation(model, batch, task.fresh_carry(model, len(batch["images"])))
        whole = jnp.max(fixed_point(f, z0, solver=solver).stats.relative_residual)
        return branch_residuals(f, z0, solver), whole

    residual_SJ, whole = both(task.picture_batch())
    assert residual_SJ.shape == (6, 1) and (np.diff(residual_SJ[:, 0]) <= 1e-6).all()
    np.testing.assert_allclose(residual_SJ[-1, 0], whole, rtol=1e-4)
