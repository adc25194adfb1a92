"""Show a puzzle being solved, application by application of f.

  python -m deq_flax.solve --checkpoint runs/maze [--size 41] [--index 3] [--steps 500] [--output FOLDER]

The puzzle is a test puzzle of the run's kind, of the size trained on or another. A table lists, for some of the iterates of the
solver, the relative residual, the confidence (mean probability of the chosen symbols) and the number of wrong cells; for
sequences also each symbol, '.' if right and 'x' if wrong. Mazes and Sudoku are drawn, as the strip solve.png and the animation
solve.gif in FOLDER.
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
    "steps", None, "limit on the applications of f; default: that of evaluation, at most 1000", flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string("output", ".", "folder of the pictures", flag_values=_FLAGS)

MOST_STEPS = 1000
"""Limit on the applications of f without --steps: every iterate is kept."""
ROWS, STRIP, FRAMES = 14, 7, 60
"""Iterates in the table, the strip and the animation, at most."""
SHOWN = 96
"""Symbols of a sequence in the table, at most."""


class Course(NamedTuple):
    """The course of a solve: T iterates of one puzzle."""

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
    course = solve(model, config, inputs, _STEPS.value)
    wrong_T = (course.answers != targets[None]).reshape(len(course.answers), -1).sum(axis=1)
    _print_table(course, wrong_T, targets)
    result = {"size": size, "steps": len(wrong_T) - 1, "residual": float(course.residual_T[-1]), "wrong": int(wrong_T[-1])}
    result["pictures"] = _draw(config.data.name, course, wrong_T, inputs, targets, Path(_OUTPUT.value))
    return result


def solve(model: Any, config: Config, inputs: np.ndarray, steps: int | None) -> Course:
    """Solve one puzzle as evaluation does, and read every iterate up to the one that evaluation returns.

    Raises:
      UserError: the model takes no such puzzle, or `steps` is out of range.
    """
    deq = config.deq
    assert deq is not None
    phase = make_phases(deq).evaluation
    assert phase.solver is not None
    limit = min(phase.solver.max_steps, MOST_STEPS) if steps is None else steps
    cli.require(limit >= 1, f"--steps must be at least 1, not {limit}")
    gradient, iterates = phase.gradient, limit
    if isinstance(gradient, Unroll):
        # The last iterate of an unrolled iteration comes after its last step; that of a solver is the last one evaluated.
        gradient, iterates = dataclasses.replace(gradient, steps=limit), limit + 1
    solver = dataclasses.replace(phase.solver, max_steps=iterates, trajectory_steps=tuple(range(iterates)))

    @jax.jit
    def run(inputs: jax.Array) -> Any:
        f, z0, *_ = model.equation(inputs)
        solution = fixed_point(f, z0, solver=solver, gradient=gradient)

        def read(z: Any) -> Any:
            probabilities = jax.nn.softmax(model.answer(z)[0].astype(jnp.float32))
            flat, after = (jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (z, f(z)))
            residual = jnp.linalg.norm(after - flat) / jnp.linalg.norm(after)
            return jnp.argmax(probabilities, -1)[0], jnp.max(probabilities, -1).mean(), residual

        return jax.lax.map(read, solution.trajectory), solution.stats.steps[0]

    try:
        (answers, confidence, residual), last = jax.device_get(run(inputs[None].astype(np.int32)))
    except ValueError as error:
        raise UserError(f"the model takes no such puzzle: {error}") from error
    kept = int(last) + 1
    return Course(answers[:kept], confidence[:kept], residual[:kept])


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
    sequence = targets.ndim == 1
    print(f"{'step':>6}  {'residual':>9}  {'confidence':>10}  {'wrong':>6}" + "  symbols" * sequence)
    for k in chosen(len(wrong_T), ROWS):
        line = f"{k:>6}  {course.residual_T[k]:>9.1e}  {course.confidence_T[k]:>10.2%}  {wrong_T[k]:>6}"
        if sequence:
            marks = "".join(np.where(course.answers[k] == targets, ".", "x")[:SHOWN])
            line += f"  {marks}{'...' if len(targets) > SHOWN else ''}"
        print(line)


def _draw(name: str, course: Course, wrong_T: np.ndarray, inputs: np.ndarray, targets: np.ndarray, folder: Path) -> list[str]:
    """Write the pictures; returns their paths."""
    strip, animation = folder / "solve.png", folder / "solve.gif"
    if name not in DRAWINGS:
        return _save({strip: [Image.fromarray(draw_course(course.answers, targets))]})

    def frame(k: int) -> np.ndarray:
        lines = [f"step {k}", f"residual {course.residual_T[k]:.1e}", f"confidence {course.confidence_T[k]:.1%}"]
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
