"""Splits of puzzles, their batches, the CSV files of Sudoku-Extreme, and wrong options."""

import numpy as np
import pytest

from deq_flax.data.loading import EvalBatches, iterate, train_dataset
from deq_flax.data.puzzles.puzzles import PuzzleOptions, fingerprints, load_puzzles
from deq_flax.data.puzzles.sudoku import is_solution, sudokus, symmetric_key
from deq_flax.errors import UserError

SMALL = dict(train_examples=120, valid_examples=20, test_examples=30)
CASES = [
    dict(name="prefix_sums", size=16, test_sizes=(24,)),
    dict(name="a5", size=4, test_sizes=(9,)),
    dict(name="maze", size=9, test_sizes=(13,)),
    dict(name="sudoku", size=4, test_sizes=(6,), augment=True),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case["name"])
def case(request):
    return request.param, load_puzzles(PuzzleOptions(**SMALL, **request.param))


def rows(inputs):
    return {row.tobytes() for row in inputs}


def test_splits_share_no_puzzle_and_hold_what_was_asked_for(case):
    options, data = case
    splits = [data.train, data.valid, data.test]
    assert [len(split) for split in splits] == [120, 20, 30]
    every = [rows(split.inputs) for split in splits]
    assert sum(map(len, every)) == 170 == len(set.union(*every))
    if options.get("augment"):
        keys = [rows(symmetric_key(split.inputs)) for split in splits]
        assert not keys[0] & keys[2] and not keys[0] & keys[1], "nor one that a symmetry turns into another's"
    (size,) = options["test_sizes"]
    assert data.larger[size].inputs.shape[1:] == (size,) * (data.train.inputs.ndim - 1) and len(data.larger[size]) == 30


def test_the_test_puzzles_do_not_depend_on_the_number_of_others(case):
    options, data = case
    more = load_puzzles(PuzzleOptions(**SMALL | {"train_examples": 150, "test_examples": 20}, **options))
    np.testing.assert_array_equal(more.test.inputs, data.test.inputs[:20])
    np.testing.assert_array_equal(more.train.inputs[:120], data.train.inputs)
    other = load_puzzles(PuzzleOptions(**SMALL, **options, seed=1))
    assert (other.test.inputs != data.test.inputs).any()
    if not options.get("augment"):  # of those there are few
        assert not rows(other.train.inputs) & rows(data.test.inputs), "not even with another seed"


def test_batches_are_those_of_grain_and_augmented_in_training_only(case):
    options, data = case
    batches = [next(iterate(train_dataset(data.train, 40, seed=0), start)) for start in (0, 3, 3)]
    np.testing.assert_array_equal(batches[1]["inputs"], batches[2]["inputs"])
    assert batches[0]["inputs"].shape == (40, *data.train.inputs.shape[1:]) and batches[0]["inputs"].dtype == np.int32
    seen = np.concatenate([batch["inputs"] for batch in batches[:2]]).astype(np.uint8)
    assert (rows(seen) <= rows(data.train.inputs)) != options.get("augment", False)
    if options.get("augment"):
        assert is_solution(seen, np.concatenate([batch["targets"] for batch in batches[:2]]).astype(np.uint8)).all()
    last = EvalBatches(data.valid, 12)[1]
    assert last["mask"].tolist() == [1] * 8 + [0] * 4
    np.testing.assert_array_equal(last["inputs"][:8], data.valid.inputs[12:])
    assert data.input_symbols > data.train.inputs.max() and data.output_symbols > data.train.targets.max()


def test_fingerprints_spread_evenly():
    """Numbers in binary: each part of eight gets its share, and no two collide."""
    bits = (np.arange(4096)[:, None] >> np.arange(12)) & 1
    prints = fingerprints(bits)
    assert len(np.unique(prints)) == 4096
    counts = np.bincount((prints % np.uint64(8)).astype(int))
    assert ((counts - 512) ** 2 / 512).sum() < 25


def test_grades_select_puzzles():
    options = dict(name="sudoku", size=6, train_examples=15, valid_examples=1, test_examples=1)
    easy, hard = (load_puzzles(PuzzleOptions(**options, grades=grades)) for grades in ((0, 0), (1, 100)))
    assert not rows(easy.train.inputs) & rows(hard.train.inputs) and len(hard.train) == 15


def csv(folder, count=14, **changed):
    """Write both files; `changed`: line number -> text, in train.csv."""
    puzzles, answers, _ = sudokus(9, 6, np.random.default_rng(0), clues=45)
    text = lambda board: "".join(map(str, board.ravel())).replace("0", ".")  # noqa: E731
    lines = [f"web,{text(puzzles[i % 6])},{text(answers[i % 6])},{i}" for i in range(count)]
    (folder / "test.csv").write_text("\n".join(["source,q,a,rating", *lines]) + "\n")
    train = ["source,q,a,rating", *lines]
    for number, line in changed.items():
        train[int(number[1:]) - 1] = line
    (folder / "train.csv").write_text("\n".join(train) + "\n")
    return puzzles, answers


def from_csv(folder, **options):
    wanted = dict(train_examples=8, valid_examples=4, test_examples=5) | options
    return load_puzzles(PuzzleOptions(name="sudoku_csv", path=str(folder), size=9, **wanted))


def test_csv_files_are_read_and_sampled(tmp_path):
    puzzles, answers = csv(tmp_path)
    data = from_csv(tmp_path)
    assert (len(data.train), len(data.valid), len(data.test)) == (8, 4, 5)
    assert is_solution(data.train.inputs, data.train.targets).all()
    assert rows(data.test.inputs) <= rows(puzzles) and rows(data.test.targets) <= rows(answers)
    np.testing.assert_array_equal(from_csv(tmp_path).train.inputs, data.train.inputs)
    assert (from_csv(tmp_path, seed=1).train.inputs != data.train.inputs).any()


GOOD = "123456789" * 9


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"_1": "q,a"}, {}, "does not begin with the line source,q,a,rating"),
        ({"_4": "web,123,456,1"}, {}, "line 4 is malformed"),
        ({f"_{i}": "x" for i in range(3, 11)}, {}, "8 lines (3, 4, 5, 6, 7, ...) are malformed"),
        ({"_5": f"web,{GOOD},{GOOD},\xff"}, {}, "line 5 is malformed"),
        ({f"_{i}": f"web,{GOOD},{GOOD},1" for i in range(2, 16)}, {}, "are wrong: the answer is no solution"),
        ({}, {"train_examples": 80}, "has 14 puzzles, but 84 are wanted"),
        ({}, {"path": ""}, "data.path is not set"),
        ({}, {"size": 4}, "a side is 9"),
    ],
)
def test_a_wrong_csv_file_is_refused_in_one_line(tmp_path, changed, options, message):
    csv(tmp_path, **changed)
    with pytest.raises(UserError) as error:
        load_puzzles(
            PuzzleOptions(**dict(name="sudoku_csv", path=str(tmp_path), size=9, train_examples=8, valid_examples=4) | options)
        )
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="chess", size=8), "no puzzle 'chess'; known: prefix_sums"),
        (dict(name="sudoku", size=5), "sudoku has no puzzles of size 5: a side is 4, 6 or 9"),
        (dict(name="maze", size=11, test_sizes=(3,)), "maze has no puzzles of size 3"),
        (dict(name="maze", size=11, path_lengths=(9, 3)), "data.path_lengths must be two numbers"),
        (dict(name="maze", size=11, path_lengths=(0, 3)), "at least one step"),
        (dict(name="maze", size=11, augment=True), "data.augment is for Sudoku"),
        (dict(name="a5", size=11, clues=3), "data.clues is for data.name sudoku"),
        (dict(name="a5", size=11, train_examples=0), "data.train_examples must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match="(?s)" + message.replace("(", r"\(")):
        PuzzleOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="prefix_sums", size=6), "too few different puzzles prefix_sums of size 6"),
        (dict(name="maze", size=11, path_lengths=(90, 95)), "hardly ever have paths"),
    ],
)
def test_puzzles_that_do_not_exist_end_the_search(options, message):
    with pytest.raises(UserError, match=message):
        load_puzzles(PuzzleOptions(**SMALL, **options))
