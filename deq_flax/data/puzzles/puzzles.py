"""Puzzles by name, generated from a seed: training, validation and test splits that share nothing, and larger sizes to test on.

To add a puzzle: a `Puzzle` in `PUZZLES`.

A puzzle belongs to the split that its fingerprint selects, whatever the seed and the numbers of examples; puzzles that are the
same under a symmetry used for augmentation have the same fingerprint. N puzzles.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from deq_flax.data.loading import Batch, Splits, check_least, data_path
from deq_flax.data.puzzles.mazes import SYMBOLS, mazes
from deq_flax.data.puzzles.sequences import elements, prefix_sums, state_tracking
from deq_flax.data.puzzles.sudoku import random_symmetry, sudokus, symmetric_key
from deq_flax.data.puzzles.sudoku_csv import read_csv
from deq_flax.data.puzzles.sudoku_solver import BOXES
from deq_flax.errors import UserError

CHUNK = 1024
"""Puzzles that are generated at a time. A constant, so that a split's first examples do not depend on how many are wanted."""
_PARTS = 8
"""One part of the fingerprints in this many is validation, one is test, the others are training."""
_PATIENCE = 30
"""Chunks in a row without a new puzzle after which there are too few."""

Arrays = tuple[np.ndarray, np.ndarray]
"""Inputs and targets, (N, ...) uint8 each."""


@dataclass(frozen=True, kw_only=True)
class PuzzleOptions:
    """Section `data` of a reasoning config."""

    name: str
    """Puzzle: {PUZZLES}. sudoku_csv is read from the files of Sudoku-Extreme, the others are generated."""
    path: str = ""
    """Folder of train.csv and test.csv, for sudoku_csv; the others need none."""
    size: int
    """Size of the puzzles to train on: length of a sequence, side of a maze in characters, side of a Sudoku (4, 6 or 9)."""
    test_sizes: tuple[int, ...] = ()
    """More sizes to test on."""
    train_examples: int = 10_000
    """Puzzles to train on."""
    valid_examples: int = 500
    """Puzzles to validate on, of the size trained on."""
    test_examples: int = 1000
    """Puzzles of each size to test on; 0, for sudoku_csv: all of test.csv."""
    seed: int = 0
    """Seed of the generator."""
    batch_size: int = 100
    """Puzzles in a training step, over all devices and micro-batches."""
    eval_batch_size: int = 100
    """Puzzles in an evaluation step, over all devices."""
    augment: bool = False
    """Show each Sudoku under a random symmetry in training: digits, rows, columns, transposition."""
    path_lengths: tuple[int, ...] = ()
    """Least and largest number of steps from start to goal of a maze, all equally likely; (): random starts and goals."""
    clues: int = 0
    """Clues of a generated Sudoku; 0: as few as keep its solution the only one."""
    grades: tuple[int, ...] = ()
    """Least and largest grade of a generated Sudoku: the number of guesses that a solver by singles needs; (): any."""
    pictures: int = 8
    """Validation puzzles shown with their predictions, for mazes and Sudoku; 0: none."""

    def __post_init__(self):
        check_least(self, 1, "size", "train_examples", "valid_examples", "batch_size", "eval_batch_size")
        check_least(self, 0 if self.name == "sudoku_csv" else 1, "test_examples")
        check_least(self, 0, "seed", "clues", "pictures")
        for name in ("test_sizes", "path_lengths", "grades"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.name not in PUZZLES:
            raise UserError(f"no puzzle {self.name!r}; known: {', '.join(PUZZLES)}")
        puzzle = PUZZLES[self.name]
        for size in (self.size, *self.test_sizes):
            if not puzzle.fits(size):
                raise UserError(f"{self.name} has no puzzles of size {size}: {puzzle.sizes}")
        for name, owner in (("path_lengths", "maze"), ("clues", "sudoku"), ("grades", "sudoku")):
            value = getattr(self, name)
            if value and self.name != owner:
                raise UserError(f"data.{name} is for data.name {owner}, not {self.name}: leave it out")
            if isinstance(value, tuple) and value and not (len(value) == 2 and 0 <= value[0] <= value[1]):
                raise UserError(f"data.{name} must be two numbers, the least and the largest, not {value}")
        if self.path_lengths and self.path_lengths[0] < 1:
            raise UserError("data.path_lengths: a path has at least one step")
        if self.augment and puzzle.augment is None:
            raise UserError(f"data.augment is for Sudoku, not {self.name}: set it to False")


@dataclass(frozen=True, kw_only=True)
class PuzzleExamples:
    """Puzzles in memory. A batch is `inputs` and `targets` (B, ...) int32, and `mask` (B,) float32, all ones."""

    inputs: np.ndarray
    targets: np.ndarray
    augment: Callable[[np.ndarray, np.ndarray, np.random.Generator], Arrays] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def read(self, indices: np.ndarray, random: np.random.Generator | None) -> Batch:
        """Read the puzzles at `indices` (B,); see `Examples.read`."""
        inputs, targets = self.inputs[indices], self.targets[indices]
        if random is not None and self.augment is not None:
            inputs, targets = self.augment(inputs, targets, random)
        return {
            "inputs": inputs.astype(np.int32),
            "targets": targets.astype(np.int32),
            "mask": np.ones(len(indices), np.float32),
        }


@dataclass(frozen=True, kw_only=True)
class PuzzleData(Splits[PuzzleExamples]):
    """The puzzles of a task. `test` is of the size trained on."""

    input_symbols: int
    """Inputs are numbers below this one."""
    output_symbols: int
    """Targets are numbers below this one."""
    larger: dict[int, PuzzleExamples] = field(default_factory=dict)
    """The test puzzles of other sizes."""


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """A kind of puzzle."""

    generate: Callable[[PuzzleOptions, int, int, np.random.Generator], Arrays] | None
    """(options, size, count, random) -> about `count` puzzles; None: read from files."""
    symbols: Callable[[int], tuple[int, int]]
    """Size -> numbers of input and of output symbols."""
    fits: Callable[[int], bool]
    """Size -> True if there are puzzles of it."""
    sizes: str
    """The sizes that fit, in words."""
    augment: Callable[..., Arrays] | None = None
    key: Callable[[np.ndarray], np.ndarray] = staticmethod(lambda inputs: inputs.reshape(len(inputs), -1))  # noqa: RUF009
    """Inputs -> (N, K) integers that the symmetries of the augmentation leave as they are."""


def load_puzzles(options: PuzzleOptions) -> PuzzleData:
    """Generate the puzzles `options.name`, or read them.

    Raises:
      UserError: there are too few, or files are missing or malformed.
    """
    puzzle = PUZZLES[options.name]
    wanted = {"train": options.train_examples, "valid": options.valid_examples, "test": options.test_examples}
    if puzzle.generate is None:
        splits = _from_csv(options, wanted)
    else:
        splits = _selected(puzzle, options, options.size, wanted, by_fingerprint=True)
    larger = {
        size: PuzzleExamples(**_named(_selected(puzzle, options, size, {"test": wanted["test"]}, by_fingerprint=False)["test"]))
        for size in options.test_sizes
        if size != options.size
    }
    inputs, outputs = zip(*(puzzle.symbols(size) for size in (options.size, *options.test_sizes)), strict=True)
    augment = puzzle.augment if options.augment else None
    return PuzzleData(
        train=PuzzleExamples(**_named(splits["train"]), augment=augment),
        valid=PuzzleExamples(**_named(splits["valid"])),
        test=PuzzleExamples(**_named(splits["test"])),
        larger=larger,
        input_symbols=max(inputs),
        output_symbols=max(outputs),
    )


def some_puzzles(options: PuzzleOptions, size: int, count: int) -> PuzzleExamples:
    """The first test puzzles of a size, which may be another than those of the options.

    Raises:
      UserError: there are none of that size, or too few.
    """
    options = dataclasses.replace(options, test_sizes=(size,))  # checks the size
    puzzle, wanted = PUZZLES[options.name], {"test": count}
    if puzzle.generate is None:
        return PuzzleExamples(**_named(_from_csv(options, {"train": 1, "valid": 1} | wanted)["test"]))
    return PuzzleExamples(**_named(_selected(puzzle, options, size, wanted, by_fingerprint=size == options.size)["test"]))


def fingerprints(key_NK: np.ndarray) -> np.ndarray:
    """(N,) uint64: a hash of each row of small integers, the same on every machine."""
    weights = np.random.default_rng(0x5EED).integers(0, 2**63, key_NK.shape[1], dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        h = (key_NK.astype(np.uint64) + np.uint64(1)) @ weights
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64
            h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return h


def split_of(fingerprint_N: np.ndarray) -> np.ndarray:
    """The split of each fingerprint, (N,) of 'train', 'valid' and 'test'."""
    return np.array(["valid", "test"] + ["train"] * (_PARTS - 2))[fingerprint_N % np.uint64(_PARTS)]


def _selected(
    puzzle: Puzzle, options: PuzzleOptions, size: int, wanted: dict[str, int], *, by_fingerprint: bool
) -> dict[str, Arrays]:
    """The first `wanted` puzzles of each split, all distinct. A size that is never trained on needs no fingerprints."""
    found: dict[str, list[Arrays]] = {split: [] for split in wanted}
    seen, idle = np.zeros(0, np.uint64), 0
    missing = dict(wanted)
    for inputs, targets in _chunks(puzzle, options, size):
        own = fingerprints(inputs.reshape(len(inputs), -1))
        _, first = np.unique(own, return_index=True)
        new = np.zeros(len(own), bool)
        new[first] = ~np.isin(own[first], seen)
        seen = np.concatenate([seen, own[new]])
        splits = split_of(fingerprints(puzzle.key(inputs))) if by_fingerprint else np.full(len(own), "test")
        useful = False
        for split in wanted:
            rows = np.flatnonzero(new & (splits == split))[: missing[split]]
            found[split].append((inputs[rows], targets[rows]))
            missing[split] -= len(rows)
            useful |= len(rows) > 0
        if not any(missing.values()):
            break
        idle = 0 if useful else idle + 1
        if idle == _PATIENCE:
            split, count = next((split, count) for split, count in missing.items() if count)
            raise UserError(
                f"there are too few different puzzles {options.name} of size {size}: {count} of {wanted[split]} {split} "
                f"examples are missing; lower data.{split}_examples, or widen data.grades"
            )
    return {split: (_joined(parts, 0), _joined(parts, 1)) for split, parts in found.items()}


def _chunks(puzzle: Puzzle, options: PuzzleOptions, size: int) -> Iterator[Arrays]:
    """Yield puzzles without end, a function of name, size, seed and the options of the generator."""
    assert puzzle.generate is not None
    random = np.random.default_rng((options.seed, size))
    while True:
        yield puzzle.generate(options, size, CHUNK, random)


def _joined(parts: list[Arrays], which: int) -> np.ndarray:
    return np.concatenate([part[which] for part in parts])


def _named(arrays: Arrays) -> dict[str, Any]:
    return {"inputs": arrays[0], "targets": arrays[1]}


def _from_csv(options: PuzzleOptions, wanted: dict[str, int]) -> dict[str, Arrays]:
    """Training and validation puzzles from train.csv, test puzzles from test.csv."""
    folder = data_path(options.path, "the folder of train.csv and test.csv, published as sapientinc/sudoku-extreme")
    learned = read_csv(folder / "train.csv", wanted["train"] + wanted["valid"], options.seed)
    order = np.random.default_rng((options.seed, 1)).permutation(len(learned[0]))
    valid, train = order[: wanted["valid"]], order[wanted["valid"] :]
    return {
        "train": (learned[0][train], learned[1][train]),
        "valid": (learned[0][valid], learned[1][valid]),
        "test": read_csv(folder / "test.csv", wanted["test"], options.seed),
    }


def _sudokus(options: PuzzleOptions, size: int, count: int, random: np.random.Generator) -> Arrays:
    inputs, targets, grades = sudokus(size, count, random, clues=options.clues)
    least, largest = options.grades or (0, np.inf)
    kept = (least <= grades) & (grades <= largest)
    return inputs[kept], targets[kept]


def _group(group: str) -> Puzzle:
    return Puzzle(
        generate=lambda options, size, count, random: state_tracking(group, size, count, random),
        symbols=lambda size: (len(elements(group)), len(elements(group))),
        fits=lambda size: size >= 1,
        sizes="a length is at least 1",
    )


_SUDOKU = partial(Puzzle, symbols=lambda size: (size + 1, size + 1), augment=random_symmetry, key=symmetric_key)

PUZZLES: dict[str, Puzzle] = {
    "prefix_sums": Puzzle(
        generate=lambda options, size, count, random: prefix_sums(size, count, random),
        symbols=lambda size: (2, 2),
        fits=lambda size: size >= 1,
        sizes="a length is at least 1",
    ),
    "a5": _group("a5"),
    "s5": _group("s5"),
    "maze": Puzzle(
        generate=lambda options, size, count, random: mazes(size, count, random, options.path_lengths),
        symbols=lambda size: (len(SYMBOLS), len(SYMBOLS)),
        fits=lambda size: size >= 5,
        sizes="a side is at least 5",
    ),
    "sudoku": _SUDOKU(generate=_sudokus, fits=lambda size: size in BOXES, sizes="a side is 4, 6 or 9"),
    "sudoku_csv": _SUDOKU(generate=None, fits=lambda size: size == 9, sizes="a side is 9"),
}
"""Puzzles by `data.name`."""
