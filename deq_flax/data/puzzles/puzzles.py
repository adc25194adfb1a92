"""Puzzles by name, generated from a seed: training, validation and test splits that share nothing, and larger sizes to test on.

To add a puzzle: a `Puzzle` in `PUZZLES`.

A puzzle belongs to the split that its fingerprint selects, whatever the seed, the numbers of examples and the size that is
trained on; puzzles that are the same under a symmetry used for augmentation have the same fingerprint. N puzzles.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from deq_flax.data.loading import Batch, Splits, check_least, data_path
from deq_flax.data.puzzles.fingerprints import fingerprints
from deq_flax.data.puzzles.mazes import SYMBOLS, mazes
from deq_flax.data.puzzles.sequences import elements, prefix_sums, state_tracking
from deq_flax.data.puzzles.sudoku import random_symmetry, refined_key, sudokus, symmetric_key
from deq_flax.data.puzzles.sudoku_csv import Rows, read_csv
from deq_flax.data.puzzles.sudoku_solver import BOXES
from deq_flax.errors import UserError

CHUNK, CHUNK_CELLS = 1024, 2**24
"""Puzzles that are generated at a time, and their cells, of which there are no more. The number depends on the size alone, so
that a split's first examples do not depend on how many are wanted."""
MOST_CELLS, MOST_IN_ALL = 2**20, 2**32
"""Cells of a puzzle, which would take minutes to generate if it had more, and of all puzzles of a data set: two bytes each."""
_PARTS = 8
"""One part of the fingerprints in this many is validation, one is test, the others are training."""
_PATIENCE = 30
"""Chunks in a row without a useful puzzle after which there are too few."""

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
        for size in (self.size, *self.test_sizes) if self.clues else ():
            if self.clues >= size**2:
                raise UserError(f"data.clues is {self.clues}, but a board of side {size} has {size**2} cells: lower it")
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
    cells: Callable[[int], int] = staticmethod(lambda size: size)  # noqa: RUF009
    """Size -> number of cells."""
    augment: Callable[..., Arrays] | None = None
    key: Callable[[np.ndarray], np.ndarray] = staticmethod(lambda inputs: inputs.reshape(len(inputs), -1))  # noqa: RUF009
    """Inputs -> (N, K) integers that the symmetries of the augmentation leave as they are."""


def load_puzzles(options: PuzzleOptions) -> PuzzleData:
    """Generate the puzzles `options.name`, or read them.

    Raises:
      UserError: there are too few, or more than fit in memory, or files are missing or malformed.
    """
    puzzle = PUZZLES[options.name]
    wanted = {"train": options.train_examples, "valid": options.valid_examples, "test": options.test_examples}
    splits = _from_csv(options, wanted) if puzzle.generate is None else _generated(options, options.size, wanted)
    others = [size for size in options.test_sizes if size != options.size]
    inputs, outputs = zip(*(puzzle.symbols(size) for size in (options.size, *others)), strict=True)
    return PuzzleData(
        train=PuzzleExamples(**_named(splits["train"]), augment=puzzle.augment if options.augment else None),
        valid=PuzzleExamples(**_named(splits["valid"])),
        test=PuzzleExamples(**_named(splits["test"])),
        larger={size: some_puzzles(options, size, options.test_examples) for size in others},
        input_symbols=max(inputs),
        output_symbols=max(outputs),
    )


def some_puzzles(options: PuzzleOptions, size: int, count: int) -> PuzzleExamples:
    """The first test puzzles of a size, which may be another than those of the options.

    Raises:
      UserError: there are none of that size, or too few.
    """
    options = dataclasses.replace(options, test_sizes=(size,))  # checks the size
    if PUZZLES[options.name].generate is None:
        return PuzzleExamples(**_named(_from_csv(options, {"test": count})["test"]))
    return PuzzleExamples(**_named(_generated(options, size, {"test": count})["test"]))


def check_learned(name: str, learned: str) -> None:
    """Raise UserError unless a model that has learned one puzzle is to solve the same: weights fit any of as many symbols."""
    if name.removesuffix("_csv") != learned.removesuffix("_csv"):
        raise UserError(f"the model of this checkpoint has learned {learned}, not {name}: leave out --config.data.name")


def split_of(fingerprint_N: np.ndarray) -> np.ndarray:
    """The split of each fingerprint, (N,) of 'train', 'valid' and 'test'."""
    return np.array(["valid", "test"] + ["train"] * (_PARTS - 2))[fingerprint_N % np.uint64(_PARTS)]


def _generated(options: PuzzleOptions, size: int, wanted: dict[str, int]) -> dict[str, Arrays]:
    """The first `wanted` generated puzzles of each split."""
    puzzle, in_all = PUZZLES[options.name], sum(wanted.values())
    assert puzzle.generate is not None
    if in_all * puzzle.cells(size) > MOST_IN_ALL:
        raise UserError(
            f"{in_all} puzzles {options.name} of size {size} have more than {MOST_IN_ALL} cells: take fewer, or smaller ones"
        )
    found = _selected(_chunks(puzzle, options, size), lambda inputs: split_of(fingerprints(puzzle.key(inputs))), wanted)
    narrow = {"path_lengths": "widen data.path_lengths", "grades": "widen data.grades", "clues": "change data.clues"}
    cures = "".join(f", or {cure}" for name, cure in narrow.items() if getattr(options, name))
    for split, count in wanted.items():
        if missing := count - len(found[split][0]):
            raise UserError(
                f"there are too few different puzzles {options.name} of size {size}: {missing} of {count} {split} examples are "
                f"missing; lower data.{split}_examples{cures}"
            )
    return found


def _chunks(puzzle: Puzzle, options: PuzzleOptions, size: int) -> Iterator[Arrays]:
    """Yield puzzles without end, a function of name, size, seed and the options of the generator."""
    assert puzzle.generate is not None
    random = np.random.default_rng((options.seed, size))
    while True:
        yield puzzle.generate(options, size, min(CHUNK, CHUNK_CELLS // puzzle.cells(size)), random)


def _selected(
    chunks: Iterable[Arrays], splits: Callable[[np.ndarray], np.ndarray], wanted: dict[str, int]
) -> dict[str, Arrays]:
    """The first `wanted` puzzles of each split, all distinct; fewer where the chunks end, or bring nothing new for long.

    `splits`: inputs (N, ...) -> names of their splits (N,).
    """
    inputs_of: dict[str, np.ndarray] = {}
    targets_of: dict[str, np.ndarray] = {}
    count, idle, seen = dict.fromkeys(wanted, 0), 0, np.zeros(0, np.uint64)
    for inputs, targets in chunks:
        idle += 1
        if len(inputs):
            own = fingerprints(inputs.reshape(len(inputs), -1))
            _, first = np.unique(own, return_index=True)
            new = np.zeros(len(own), bool)
            new[first] = ~np.isin(own[first], seen)
            seen = np.concatenate([seen, own[new]])
            names = splits(inputs)
            for split, most in wanted.items():
                rows = np.flatnonzero(new & (names == split))[: most - count[split]]
                for store, array in ((inputs_of, inputs), (targets_of, targets)):
                    if split not in store:  # all at once, so that the puzzles are in memory but once
                        store[split] = np.empty((most, *array.shape[1:]), array.dtype)
                    store[split][count[split] : count[split] + len(rows)] = array[rows]
                count[split] += len(rows)
                idle = 0 if len(rows) else idle
        if count == wanted or idle == _PATIENCE:
            break
    nothing = np.zeros((0, 0), np.uint8)
    first_of = lambda store, split: store.get(split, nothing)[: count[split]]  # noqa: E731
    return {split: (first_of(inputs_of, split), first_of(targets_of, split)) for split in wanted}


def _named(arrays: Arrays) -> dict[str, Any]:
    return {"inputs": arrays[0], "targets": arrays[1]}


def _from_csv(options: PuzzleOptions, wanted: dict[str, int]) -> dict[str, Arrays]:
    """Puzzles from the files: test puzzles from test.csv, the others from train.csv in a random order.

    Rows of train.csv that are puzzles of test.csv under a symmetry are left out.
    """
    folder = data_path(options.path, "the folder of train.csv and test.csv, published as sapientinc/sudoku-extreme")
    test = read_csv(folder / "test.csv")
    count = wanted["test"] or len(test)
    if count > len(test):
        raise UserError(f"{test.path} has {len(test)} different puzzles, but {count} are wanted: lower data.test_examples")
    found = {"test": test.read(np.sort(np.random.default_rng(options.seed).permutation(len(test))[:count]))}
    learned = {split: count for split, count in wanted.items() if split != "test"}
    if not learned:
        return found
    train, held = read_csv(folder / "train.csv"), np.concatenate([refined_key(test.boards(rows)) for rows in _parts(test)])

    def splits(inputs: np.ndarray) -> np.ndarray:
        own = refined_key(inputs)
        names = np.where(split_of(own) == "valid", "valid", "train")
        return np.where(np.isin(own, held), "", names)

    order = np.random.default_rng((options.seed, 1)).permutation(len(train))
    found |= _selected((train.read(order[rows]) for rows in _parts(train)), splits, learned)
    for split, count in learned.items():
        if (number := len(found[split][0])) < count:
            raise UserError(
                f"{train.path} has {len(train)} different puzzles, of which {number} can be {split} examples, because one in "
                f"{_PARTS} is kept for validation, and none is that test.csv has under a symmetry: lower data.{split}_examples "
                f"from {count}"
            )
    return found


def _parts(rows: Rows) -> Iterator[np.ndarray]:
    """The numbers of rows in parts."""
    return (np.arange(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK))


def _sudokus(options: PuzzleOptions, size: int, count: int, random: np.random.Generator) -> Arrays:
    inputs, targets, grades = sudokus(size, count, random, clues=options.clues)
    least, largest = options.grades or (0, np.inf)
    kept = (least <= grades) & (grades <= largest)
    return inputs[kept], targets[kept]


_LENGTHS = f"a length is from 1 to {MOST_CELLS}"


def _fits_sequence(length: int) -> bool:
    return 1 <= length <= MOST_CELLS


def _group(group: str) -> Puzzle:
    return Puzzle(
        generate=lambda options, size, count, random: state_tracking(group, size, count, random),
        symbols=lambda size: (len(elements(group)), len(elements(group))),
        fits=_fits_sequence,
        sizes=_LENGTHS,
    )


_SUDOKU = partial(
    Puzzle,
    symbols=lambda size: (size + 1, size + 1),
    cells=lambda size: size**2,
    augment=random_symmetry,
    key=symmetric_key,
)

PUZZLES: dict[str, Puzzle] = {
    "prefix_sums": Puzzle(
        generate=lambda options, size, count, random: prefix_sums(size, count, random),
        symbols=lambda size: (2, 2),
        fits=_fits_sequence,
        sizes=_LENGTHS,
    ),
    "a5": _group("a5"),
    "s5": _group("s5"),
    "maze": Puzzle(
        generate=lambda options, size, count, random: mazes(size, count, random, options.path_lengths),
        symbols=lambda size: (len(SYMBOLS), len(SYMBOLS)),
        fits=lambda size: 5 <= size <= math.isqrt(MOST_CELLS),
        sizes=f"a side is from 5 to {math.isqrt(MOST_CELLS)}",
        cells=lambda size: size**2,
    ),
    "sudoku": _SUDOKU(generate=_sudokus, fits=lambda size: size in BOXES, sizes="a side is 4, 6 or 9"),
    "sudoku_csv": _SUDOKU(generate=None, fits=lambda size: size == 9, sizes="a side is 9"),
}
"""Puzzles by `data.name`."""
