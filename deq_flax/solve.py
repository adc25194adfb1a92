"""Show a puzzle being solved, application by application of f.

  python -m deq_flax.solve --checkpoint runs/maze [--size 41] [--index 3] [--steps 500] [--output FOLDER]

The puzzle is a test puzzle of the run's kind, of the size trained on or another, solved as evaluation does, through all of its
segments. A table lists, for some of the iterates, the number of applications of f, the relative residual, the confidence (mean
probability of the chosen symbols) and the number of wrong cells. Of a sequence it marks where they are, '.' if right and 'x' if
wrong; puzzle, target and answer are printed below it, and solve.png in FOLDER has a row for each iterate. Mazes and Sudoku are
drawn, as the strip solve.png and the animation solve.gif.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

from deq_flax import cli
from deq_flax.config import Config
from deq_flax.config_files import checkpoint_config, stored_config
from deq_flax.data.puzzles.puzzles import PUZZLES, PuzzleOptions, check_learned, some_puzzles
from deq_flax.equilibrium import Unroll, fixed_point
from deq_flax.errors import UserError
from deq_flax.pretrained import load_model
from deq_flax.tasks.puzzle_pictures import DRAWINGS, captioned, draw_course, in_a_row
from deq_flax.train.phases import make_phases

_FLAGS = flags.FlagValues()  # not the global ones, so that this module can be imported beside other commands
_CONFIG = cli.config_flag(_FLAGS)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "a workdir, its checkpoints folder, or the folder of one step", flag_values=_FLAGS
)
_SIZE = flags.DEFINE_integer("size", None, "size of the puzzle; default: that trained on", flag_values=_FLAGS)
_INDEX = flags.DEFINE_integer("index", 0, "number of the test puzzle, from 0", flag_values=_FLAGS)
_STEPS = flags.DEFINE_integer(
    "steps", None, "limit on the applications of f, in each segment; default: that of evaluation", flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string("output", ".", "folder of the pictures", flag_values=_FLAGS)

KEPT, KEPT_BYTES = 1001, 2**29
"""Iterates of a segment that are kept, and their bytes, at most; where there are more, those kept lie at growing distances."""
ROWS, STRIP, FRAMES = 14, 7, 60
"""Iterates in the table, the strip and the animation, at most."""
WIDTH, BLOCKS = 96, 8
"""Characters of a sequence in a line, and lines of each of puzzle, target and answer, at most."""


class Course(NamedTuple):
    """The course of a solve: T iterates of one puzzle."""

    step_T: np.ndarray
    """Applications of f before the iterate, in all segments together."""
    answers: np.ndarray
    """(T, ...): the symbols chosen."""
    confidence_T: np.ndarray
    residual_T: np.ndarray


def main() -> dict[str, Any]:
    """Run the command; returns its result."""
    cli.require(_INDEX.value >= 0, f"--index must be at least 0, not {_INDEX.value}")
    loaded = load_model(_CHECKPOINT.value or "", cli.resolved(_FLAGS))
    model, config = loaded.model, loaded.config
    if model.kind != "puzzle" or not model.has_equilibrium:
        raise UserError(f"--checkpoint: model {config.model.name!r} solves no puzzles by iterating; train task reasoning")
    size = config.data.size if _SIZE.value is None else _SIZE.value
    check_learned(config.data.name, stored_config(loaded.meta).data.name)
    check_symbols(config, size)
    inputs, targets = _puzzle(config.data, size, _INDEX.value)
    course = solve(model, config, inputs, _STEPS.value, row=_INDEX.value % config.data.eval_batch_size)
    wrong_T = (course.answers != targets[None]).reshape(len(course.answers), -1).sum(axis=1)
    _print_table(course, wrong_T, targets)
    if targets.ndim == 1:
        _print_sequence(inputs, targets, course.answers[-1])
    steps, residual = int(course.step_T[-1]), float(course.residual_T[-1])
    result = {"size": size, "steps": steps, "residual": residual, "wrong": int(wrong_T[-1])}
    result["pictures"] = _draw(config.data.name, course, wrong_T, inputs, targets, Path(_OUTPUT.value))
    return result


def solve(model: Any, config: Config, inputs: np.ndarray, steps: int | None, *, row: int = 0) -> Course:
    """Solve one puzzle as evaluation does, and read the iterates up to the one that evaluation returns.

    `row`: the puzzle's row in a batch of evaluation, which decides what random state it starts from.

    Raises:
      UserError: the model takes no such puzzle, or `steps` is out of range.
    """
    deq = config.deq
    assert deq is not None
    phase = make_phases(deq).evaluation
    assert phase.solver is not None
    limit = phase.solver.max_steps if steps is None else steps
    cli.require(limit >= 1, f"--steps must be at least 1, not {limit}")
    gradient, iterates = phase.gradient, limit
    if isinstance(gradient, Unroll):
        # The last iterate of an unrolled iteration comes after its last step; that of a solver is the last one evaluated.
        gradient, iterates = dataclasses.replace(gradient, steps=limit), limit + 1
    inputs_B = jnp.asarray(inputs[None].astype(np.int32))
    bytes_of_state = sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.initial_state, inputs_B)))
    most = max(2, min(KEPT, KEPT_BYTES // bytes_of_state))
    kept = np.array(range(iterates) if iterates <= most else chosen(iterates, most))
    solver = dataclasses.replace(phase.solver, max_steps=iterates, trajectory_steps=tuple(kept.tolist()))

    @jax.jit
    def start(inputs_B: jax.Array) -> Any:
        rows = jnp.broadcast_to(inputs_B, (row + 1, *inputs_B.shape[1:]))
        return jax.tree.map(lambda leaf: leaf[row:], model.initial_state(rows))

    @jax.jit
    def segment(inputs_B: jax.Array, state: Any) -> Any:
        """The readings of the iterates, of the value, its step, and the value."""
        f, z0, *_ = model.equation(inputs_B, state)
        solution = fixed_point(f, z0, solver=solver, gradient=gradient)

        def read(z: Any) -> Any:
            probabilities = jax.nn.softmax(model.answer(z)[0].astype(jnp.float32))
            flat, after = (jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (z, f(z)))
            residual = jnp.linalg.norm(after - flat) / jnp.linalg.norm(after)
            return jnp.argmax(probabilities, -1)[0], jnp.max(probabilities, -1).mean(), residual

        return jax.lax.map(read, solution.trajectory), read(solution.value), solution.stats.steps[0], solution.value

    parts: list[tuple[np.ndarray, ...]] = []
    try:
        state, before = start(inputs_B), 0
        for number in range(config.loss.segments_of_evaluation):
            trajectory, value, last, state = segment(inputs_B, state)
            last = int(last)
            # The first iterate of a segment is the last one of the segment before, and has been read.
            rows = np.flatnonzero((kept < last) & (kept >= min(number, 1)))
            ends = last > 0 or number == 0
            read = [
                np.concatenate([np.asarray(t)[rows], np.asarray(v)[None][:ends]])
                for t, v in zip(trajectory, value, strict=True)
            ]
            parts.append((before + np.append(kept[rows], [last] * ends), *read))
            before += last
    except ValueError as error:
        raise UserError(f"the model takes no such puzzle: {error}") from error
    return Course(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def check_symbols(config: Config, size: int) -> None:
    """Raise UserError if the model does not know the symbols of puzzles of a size."""
    puzzle = PUZZLES[config.data.name]
    found, known = puzzle.symbols(size), (config.model.input_symbols, config.model.output_symbols)
    if puzzle.fits(size) and any(a > b for a, b in zip(found, known, strict=True)):
        raise UserError(f"--size {size}: such puzzles have {max(found)} symbols, but this model knows {min(known)} only")


def _puzzle(data: PuzzleOptions, size: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of test puzzle `index` of a size."""
    found = some_puzzles(data, size, index + 1)
    return found.inputs[index], found.targets[index]


def chosen(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`: first, last, and in between at growing distances."""
    spread = np.geomspace(1, count, min(most, count)) - 1
    return sorted({*np.rint(spread).astype(int).tolist(), count - 1})


def _print_table(course: Course, wrong_T: np.ndarray, targets: np.ndarray) -> None:
    sequence, group = targets.ndim == 1, -(-len(targets) // WIDTH)
    marked = ("  symbols" + f", {group} to a mark" * (group > 1)) * sequence
    print(f"{'step':>6}  {'residual':>9}  {'confidence':>10}  {'wrong':>6}{marked}")
    for k in chosen(len(wrong_T), ROWS):
        line = f"{course.step_T[k]:>6}  {course.residual_T[k]:>9.1e}  {course.confidence_T[k]:>10.2%}  {wrong_T[k]:>6}"
        if sequence:
            wrong = np.logical_or.reduceat(course.answers[k] != targets, np.arange(0, len(targets), group))
            line += "  " + "".join(np.where(wrong, "x", "."))
        print(line)


def _print_sequence(inputs: np.ndarray, targets: np.ndarray, answer: np.ndarray) -> None:
    """Print puzzle, target and answer, broken into lines; of many lines, those with a wrong symbol before others."""
    digits = len(str(max(inputs.max(), targets.max(), answer.max())))
    gap = " " * (digits > 1)
    across = WIDTH // (digits + len(gap))
    wrong = answer != targets
    starts = list(range(0, len(targets), across))
    shown = sorted(sorted(starts, key=lambda start: not wrong[start : start + across].any())[:BLOCKS])
    for start in shown:
        part = slice(start, start + across)
        print(f"symbols {start + 1} to {min(start + across, len(targets))}:")
        marks = np.where(wrong[part], "x", ".")
        for name, values in {"puzzle": inputs[part], "target": targets[part], "answer": answer[part], "": marks}.items():
            if name or wrong[part].any():
                print(f"  {name:<6}  {gap.join(f'{value:>{digits}}' for value in values)}")
    left = [start for start in starts if start not in shown]
    if left:
        count = sum(int(wrong[start : start + across].sum()) for start in left)
        print(f"and {len(left)} more such lines, with {count} wrong symbols")


def _draw(name: str, course: Course, wrong_T: np.ndarray, inputs: np.ndarray, targets: np.ndarray, folder: Path) -> list[str]:
    """Write the pictures; returns their paths."""
    strip, animation = folder / "solve.png", folder / "solve.gif"
    if name not in DRAWINGS:
        return _save({strip: [Image.fromarray(draw_course(course.answers, targets))]})

    def frame(k: int) -> np.ndarray:
        lines = [f"step {course.step_T[k]}", f"residual {course.residual_T[k]:.1e}", f"confidence {course.confidence_T[k]:.1%}"]
        return captioned(DRAWINGS[name](inputs, course.answers[k], targets), [*lines, f"{wrong_T[k]} wrong"])

    frames = [Image.fromarray(frame(k)) for k in chosen(len(wrong_T), FRAMES)]
    row = Image.fromarray(in_a_row([frame(k) for k in chosen(len(wrong_T), STRIP)]))
    return _save({strip: [row], animation: frames})


def _save(pictures: dict[Path, list[Image.Image]]) -> list[str]:
    """Write pictures, an animation where there are several; returns their paths."""
    for path, frames in pictures.items():
        options: dict[str, Any] = {}
        if len(frames) > 1:
            durations = [150] * (len(frames) - 1) + [2000]  # the last frame stays
            options = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            frames[0].save(path, **options)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        print(path)
    return [str(path) for path in pictures]


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",), of_run=("checkpoint", checkpoint_config), flag_values=_FLAGS)
