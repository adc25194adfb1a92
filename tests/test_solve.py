"""The solve command: the course of a solve is that of evaluation, and is shown."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from deq_flax import solve
from deq_flax.config import make_task, resolve
from deq_flax.data.puzzles.puzzles import check_learned
from deq_flax.errors import UserError
from tests.commands import command
from tests.train.small import run, solve_of

MAZE = {
    "task": "reasoning",
    "data": dict(
        name="maze", size=5, train_examples=8, valid_examples=2, test_examples=2, batch_size=4, eval_batch_size=2, pictures=2
    ),
    "model": dict(name="conv_reasoner", width=4, blocks=0, axes=2, input_symbols=6, output_symbols=6),
    "deq": dict(solver="picard", tol=1e-2, max_steps=6, gradient="unroll", gradient_options={"last": 2}, eval_max_steps=30),
    "train": dict(steps=1),
    "mesh": dict(data=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("unrolled", [False, True])
def test_the_course_ends_at_the_iterate_that_evaluation_returns(unrolled):
    c = MAZE | {"deq": MAZE["deq"] | {"eval_unrolled": unrolled}}
    config = resolve(c)
    task = make_task(config)
    model = task.build_model(nnx.Rngs(0))
    inputs = task.puzzles.test.inputs[0]
    output = model(inputs[None].astype(np.int32), solve=solve_of(c))
    course = solve.solve(model, config, inputs, None)
    assert len(course.answers) == output.stats.steps[0] + 1
    np.testing.assert_array_equal(course.answers[-1], np.argmax(output.logits[0], axis=-1))
    np.testing.assert_allclose(course.residual_T[-1], output.stats.relative_residual[0], rtol=1e-2)
    assert (course.confidence_T <= 1).all() and (course.confidence_T > 1 / 6).all()
    short = solve.solve(model, config, inputs, 3)
    np.testing.assert_array_equal(short.answers, course.answers[: len(short.answers)])


def test_iterates_are_chosen_at_growing_distances():
    assert solve.chosen(1, 5) == [0] and solve.chosen(3, 5) == [0, 1, 2]
    many = solve.chosen(1000, 8)
    assert many[0] == 0 and many[-1] == 999 and len(many) <= 8
    assert sorted(np.diff(many).tolist()) == np.diff(many).tolist()


@pytest.mark.slow
def test_a_run_shows_its_puzzles(tmp_path):
    """The command in a process of its own: a larger maze than those trained on, and its pictures."""
    run(MAZE, tmp_path / "run")
    where = ("--checkpoint", tmp_path / "run", "--output", tmp_path)
    shown = command("solve", *where, "--size", "9", "--index", "1", "--steps", "5")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["step", "residual", "confidence", "wrong"] and lines[1].split()[0] == "0"
    with Image.open(tmp_path / "solve.png") as strip, Image.open(tmp_path / "solve.gif") as animation:
        assert strip.size[0] > strip.size[1] and animation.n_frames > 1


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (dict(name="sudoku", size=4), 5, "sudoku has no puzzles of size 5"),
        (dict(name="maze", size=5), 3, "maze has no puzzles of size 3"),
        (dict(name="prefix_sums", size=2), 2, "too few different puzzles"),
    ],
)
def test_puzzles_that_do_not_exist_are_refused(data, size, message):
    with pytest.raises(UserError, match=message):
        solve._puzzle(dataclasses.replace(resolve(MAZE).data, **data), size, 40)


def test_puzzles_of_unknown_symbols_are_refused():
    config = resolve(MAZE)
    sudoku = dataclasses.replace(config, data=dataclasses.replace(config.data, name="sudoku", size=4))
    solve.check_symbols(config, 9)
    with pytest.raises(UserError, match="such puzzles have 10 symbols, but this model knows 6 only"):
        solve.check_symbols(sudoku, 9)


def test_weights_of_another_puzzle_are_refused():
    """Shapes do not tell them apart: boards of 4 x 4 have fewer symbols than a maze."""
    check_learned("sudoku", "sudoku_csv")
    with pytest.raises(UserError, match="has learned maze, not sudoku: leave out"):
        check_learned("sudoku", "maze")
