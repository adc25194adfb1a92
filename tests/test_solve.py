"""The solve command: the course of a solve is that of evaluation, and is shown."""

import dataclasses

import jax
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


SEGMENTS = {
    **MAZE,
    "model": MAZE["model"] | dict(halting=True),
    "deq": MAZE["deq"] | dict(eval_max_steps=3),
    "loss": dict(segments=2, eval_segments=4),
}


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_course_goes_through_all_segments_of_evaluation(unrolled):
    """From the state that the puzzle's row in a batch starts from; every iterate once."""
    c = SEGMENTS | {"deq": SEGMENTS["deq"] | {"eval_unrolled": unrolled}}
    config = resolve(c)
    task = make_task(config)
    model, batch = task.build_model(nnx.Rngs(0)), task.eval_batches("test")[0]
    output = jax.jit(lambda inputs: task._worked_out(model, inputs, None, solve_of(c)))(batch["inputs"])
    course = solve.solve(model, config, task.puzzles.test.inputs[1], None, row=1)
    steps = int(output.stats.steps[1])
    assert course.step_T.tolist() == list(range(steps + 1)) and steps == (12 if unrolled else 8)
    np.testing.assert_array_equal(course.answers[-1], np.argmax(output.logits[1], axis=-1))
    np.testing.assert_allclose(course.residual_T[-1], output.stats.relative_residual[1], rtol=1e-2)


def test_of_a_state_too_large_to_keep_every_iterate_some_are_kept(monkeypatch):
    config = resolve(MAZE | {"deq": MAZE["deq"] | dict(eval_max_steps=60, eval_unrolled=True)})
    task = make_task(config)
    model, inputs = task.build_model(nnx.Rngs(0)), task.puzzles.test.inputs[0]
    every = solve.solve(model, config, inputs, None)
    monkeypatch.setattr(solve, "KEPT_BYTES", 5 * 4 * 25 * MAZE["model"]["width"])  # of five states
    some = solve.solve(model, config, inputs, None)
    assert some.step_T[[0, -1]].tolist() == [0, 60] and len(some.step_T) == 5
    for name in ("answers", "confidence_T", "residual_T"):
        np.testing.assert_allclose(getattr(some, name), getattr(every, name)[some.step_T], rtol=1e-5)


def test_a_sequence_is_printed_with_its_answer_and_every_wrong_symbol(capsys):
    """Of 2,000 bits in lines of 96 two are wrong, far behind."""
    targets = np.random.default_rng(0).integers(0, 2, 2000).astype(np.uint8)
    inputs, answer = np.diff(targets, prepend=0).astype(np.uint8) & 1, targets.copy()
    answer[[1500, 1999]] ^= 1
    solve._print_sequence(inputs, targets, answer)
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("symbols 1441 to 1536:")
    shown = {name: "".join(map(str, values[1440:1536])) for name, values in (("puzzle", inputs), ("target", targets))}
    assert [lines[at + 1].split(), lines[at + 2].split()] == [[name, text] for name, text in shown.items()]
    assert lines[at + 4].split() == ["." * 60 + "x" + "." * 35] and "symbols 1921 to 2000:" in lines
    assert "".join(lines).count("x") == 2 and lines[-1] == "and 13 more such lines, with 0 wrong symbols"


def test_the_table_marks_wrong_symbols_wherever_they_are(capsys):
    targets = np.zeros(200, np.uint8)
    answers = np.zeros((1, 200), np.uint8)
    answers[0, 197] = 1
    course = solve.Course(np.array([7]), answers, np.array([0.5]), np.array([0.25]))
    solve._print_table(course, np.array([1]), targets)
    head, line = capsys.readouterr().out.splitlines()
    assert head.endswith("symbols, 3 to a mark") and line.split() == ["7", "2.5e-01", "50.00%", "1", "." * 65 + "x."]


def test_symbols_of_several_digits_are_kept_apart(capsys):
    solve._print_sequence(np.array([3, 59]), np.array([3, 17]), np.array([3, 17]))
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["puzzle", "3", "59"], ["target", "3", "17"], ["answer", "3", "17"],
    ]  # fmt: skip


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
        (dict(name="maze", size=5), 10_000, "a side is from 5 to 1024"),
        (dict(name="prefix_sums", size=8), 10**9, "a length is from 1 to 1048576"),
        (dict(name="sudoku", size=4, grades=(500, 900)), 4, "too few different puzzles"),
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
