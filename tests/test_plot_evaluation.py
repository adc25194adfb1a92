"""The figures of an evaluation: each point is one of its numbers, at its limit and size."""

import json

import pytest

from deq_flax import plot
from deq_flax.errors import UserError
from deq_flax.plot_evaluation import by_size, draw_evaluation, read_evaluation

TEST = {"exact_match": 1.0, "cell_accuracy": 1.0, "exact_match_64": 0.5, "exact_match_vote_64": 0.9, "exact_match_128": 0.25}
EVALUATION = {
    "metrics": {"valid": {"exact_match": 1.0}, "test": TEST},
    "sweep": [
        {"split": "valid", "max_steps": 10, "exact_match": 0.7},
        {"split": "test", "max_steps": 10, "exact_match": 0.75, "exact_match_64": 0.0, "exact_match_128": 0.0},
    ],
    "config": {"task": "reasoning", "data": {"size": 32}, "deq": {"max_steps": 30, "eval_max_steps": 100}},
}


def write(folder, evaluation):
    (folder / "eval.json").write_text(evaluation if isinstance(evaluation, str) else json.dumps(evaluation))
    return folder


def drawn(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}


def test_a_metric_is_found_at_every_size():
    assert by_size(TEST, 32) == {32: 1.0, 64: 0.5, 128: 0.25}
    assert by_size(TEST | {"steps": 3, "steps_96": 9}, 32) == by_size(TEST, 32)


def test_the_curves_are_those_of_the_test_split(tmp_path):
    pyplot = plot._pyplot()
    figures = draw_evaluation(pyplot, read_evaluation(write(tmp_path, EVALUATION)))
    assert drawn(figures["iterations"]) == {
        "size 32": [[10, 0.75], [100, 1.0]],
        "size 64": [[10, 0.0], [100, 0.5]],
        "size 128": [[10, 0.0], [100, 0.25]],
    }
    sizes = drawn(figures["sizes"])
    assert sizes["test"] == [[32, 1.0], [64, 0.5], [128, 0.25]]
    pyplot.close("all")


def test_without_a_sweep_or_other_sizes_there_is_nothing_to_draw(tmp_path):
    plain = EVALUATION | {"sweep": [], "metrics": {"test": {"exact_match": 1.0}}}
    assert draw_evaluation(plot._pyplot(), read_evaluation(write(tmp_path, plain))) == {}


@pytest.mark.parametrize(
    ("task", "metric", "axis", "scale"),
    [
        ("language", "ppl", "perplexity", "log"),
        ("classification", "accuracy", "accuracy", "linear"),
        ("segmentation", "miou", "mean intersection over union", "linear"),
    ],
)
def test_the_score_of_each_task_is_drawn_against_the_limit(tmp_path, task, metric, axis, scale):
    """From the initial guess, limit 0, to the limit of the evaluation itself; an infinite perplexity has no point."""
    evaluation = {
        "metrics": {"valid": {metric: 0.5}, "test": {metric: 0.9}},
        "sweep": [
            {"split": split, "max_steps": limit, metric: score}
            for limit, score in ((0, 0.1), (2, None), (4, 0.8))
            for split in ("valid", "test")
        ],
        "config": {"task": task, "data": {"name": "any"}, "deq": {"max_steps": 30, "eval_max_steps": 0}},
    }
    pyplot = plot._pyplot()
    figures = draw_evaluation(pyplot, read_evaluation(write(tmp_path, evaluation)))
    assert list(figures) == ["iterations"]
    assert drawn(figures["iterations"]) == {"test": [[0, 0.1], [4, 0.8], [30, 0.9]]}
    (panel,) = figures["iterations"].axes
    assert (panel.get_ylabel(), panel.get_yscale()) == (axis, scale)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "4", "30"]
    pyplot.close("all")


def test_a_run_without_an_evaluation_or_without_a_limit_to_sweep_over_has_no_figure(tmp_path):
    assert read_evaluation(tmp_path) is None
    explicit = {"metrics": {"test": {"ppl": 9.0}}, "sweep": [], "config": {"task": "language", "deq": None}}
    assert draw_evaluation(plot._pyplot(), read_evaluation(write(tmp_path, explicit))) == {}


@pytest.mark.parametrize(
    "damaged",
    [
        "no json",
        "[]",
        EVALUATION | {"metrics": {}},
        EVALUATION | {"sweep": [3]},
        EVALUATION | {"config": {"task": "reasoning"}},
        EVALUATION | {"config": {"task": "language", "deq": {"max_steps": 30, "eval_max_steps": 100}}},
    ],
)
def test_a_damaged_evaluation_is_one_line(tmp_path, damaged):
    with pytest.raises(UserError, match=r"eval\.json is no evaluation") as error:
        read_evaluation(write(tmp_path, damaged))
    assert "\n" not in str(error.value)
