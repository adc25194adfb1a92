"""Splits of puzzles, their batches, the CSV files of Sudoku-Extreme, and wrong options."""

import numpy as np
import pytest

from deq_flax.data.loading import EvalBatches, iterate, train_dataset
from deq_flax.data.puzzles import puzzles as module
from deq_flax.data.puzzles.fingerprints import fingerprints
from deq_flax.data.puzzles.puzzles import CHUNK, PUZZLES, PuzzleOptions, load_puzzles, some_puzzles
from deq_flax.data.puzzles.sudoku import is_solution, random_symmetry, refined_key, sudokus, symmetric_key
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


def test_the_test_puzzles_of_a_size_are_the_same_whichever_size_is_trained_on(case):
    """So a run of the one size learns nothing of what a run of the other is tested on, as where a run begins from another's."""
    options, data = case
    (size,) = options["test_sizes"]
    other = load_puzzles(PuzzleOptions(**SMALL | options | {"size": size, "test_sizes": (options["size"],)}))
    np.testing.assert_array_equal(other.test.inputs, data.larger[size].inputs)
    np.testing.assert_array_equal(other.larger[options["size"]].inputs, data.test.inputs)
    np.testing.assert_array_equal(some_puzzles(PuzzleOptions(**options), size, 5).inputs, other.test.inputs[:5])
    assert not rows(data.larger[size].inputs) & (rows(other.train.inputs) | rows(other.valid.inputs))


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


def text_of(board):
    return "".join(map(str, board.ravel())).replace("0", ".")


def write_csv(path, puzzles, answers):
    lines = [f"web,{text_of(puzzle)},{text_of(answer)},1" for puzzle, answer in zip(puzzles, answers, strict=True)]
    path.write_text("\n".join(["source,q,a,rating", *lines]) + "\n")


@pytest.fixture(scope="module")
def boards():
    return sudokus(9, 60, np.random.default_rng(0), clues=45)[:2]


def csv(folder, boards, **changed):
    """Write both files, 40 puzzles and 20 others; `changed`: line number -> text, in train.csv."""
    write_csv(folder / "train.csv", *(array[:40] for array in boards))
    write_csv(folder / "test.csv", *(array[40:] for array in boards))
    train = (folder / "train.csv").read_text().splitlines()
    for number, line in changed.items():
        train[int(number[1:]) - 1] = line
    (folder / "train.csv").write_text("\n".join(train) + "\n")


def from_csv(folder, **options):
    wanted = dict(train_examples=20, valid_examples=2, test_examples=5) | options
    return load_puzzles(PuzzleOptions(name="sudoku_csv", path=str(folder), size=9, **wanted))


def test_csv_files_are_read_and_sampled(tmp_path, boards):
    csv(tmp_path, boards)
    data = from_csv(tmp_path)
    assert (len(data.train), len(data.valid), len(data.test)) == (20, 2, 5)
    assert is_solution(data.train.inputs, data.train.targets).all()
    assert rows(data.test.inputs) <= rows(boards[0][40:]) and rows(data.test.targets) <= rows(boards[1][40:])
    assert rows(data.train.inputs) | rows(data.valid.inputs) <= rows(boards[0][:40])
    np.testing.assert_array_equal(from_csv(tmp_path).train.inputs, data.train.inputs)
    assert (from_csv(tmp_path, seed=1).train.inputs != data.train.inputs).any()
    assert len(from_csv(tmp_path, test_examples=0).test) == 20
    options = PuzzleOptions(name="sudoku_csv", path=str(tmp_path), size=9)
    (tmp_path / "train.csv").unlink()
    np.testing.assert_array_equal(some_puzzles(options, 9, 5).inputs, data.test.inputs)


def test_splits_of_csv_files_share_no_puzzle_nor_one_under_a_symmetry(tmp_path, boards):
    """Sixty puzzles under four symmetries each, some twice, in train.csv; twenty of the sixty, some twice, in test.csv."""
    moved = [random_symmetry(*boards, np.random.default_rng(i)) for i in range(4)]
    many = [np.concatenate(each) for each in zip(*moved, strict=True)]
    write_csv(tmp_path / "train.csv", *(np.concatenate([array, array[:20]]) for array in many))
    write_csv(tmp_path / "test.csv", *(np.concatenate([array[40:], array[40:45]]) for array in boards))
    data = from_csv(tmp_path, train_examples=100, valid_examples=8, test_examples=0)
    keys = [set(refined_key(split.inputs).tolist()) for split in (data.train, data.valid, data.test)]
    assert sum(map(len, keys)) == len(set.union(*keys)) and len(keys[2]) == len(data.test) == 20
    assert len(rows(data.train.inputs)) == 100 and len(rows(data.valid.inputs)) == 8


def test_one_puzzle_many_times_is_one(tmp_path, boards):
    write_csv(tmp_path / "train.csv", *(np.repeat(array[:1], 100, axis=0) for array in boards))
    write_csv(tmp_path / "test.csv", *(array[:1] for array in boards))
    with pytest.raises(UserError, match="has 1 different puzzles, of which 0 can be train examples"):
        from_csv(tmp_path, test_examples=1)


GOOD = "123456789" * 9


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"_1": "q,a"}, {}, "does not begin with the line source,q,a,rating"),
        ({"_4": "web,123,456,1"}, {}, "line 4 is malformed"),
        ({f"_{i}": "x" for i in range(3, 11)}, {}, "8 lines (3, 4, 5, 6, 7, ...) are malformed"),
        ({"_5": f"web,{GOOD},{GOOD},\xff"}, {}, "line 5 is malformed"),
        ({"_7": f"web,{GOOD},{GOOD},1"}, {}, "line 7 is wrong: the answer is no solution"),
        ({}, {"train_examples": 80}, "has 40 different puzzles, of which "),
        ({}, {"test_examples": 80}, "has 20 different puzzles, but 80 are wanted"),
        ({}, {"path": ""}, "data.path is not set"),
        ({}, {"size": 4}, "a side is 9"),
    ],
)
def test_a_wrong_csv_file_is_refused_in_one_line(tmp_path, boards, changed, options, message):
    csv(tmp_path, boards, **changed)
    with pytest.raises(UserError) as error:
        load_puzzles(
            PuzzleOptions(
                **dict(name="sudoku_csv", path=str(tmp_path), size=9, train_examples=8, valid_examples=2, test_examples=5)
                | options
            )
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
        (dict(name="maze", size=10_000), "maze has no puzzles of size 10000: a side is from 5 to 1024"),
        (
            dict(name="prefix_sums", size=8, test_sizes=(10**9,)),
            "prefix_sums has no puzzles of size 1000000000: a length is from",
        ),
        (dict(name="sudoku", size=4, clues=17), "data.clues is 17, but a board of side 4 has 16 cells"),
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
        (dict(name="prefix_sums", size=6), r"too few different puzzles prefix_sums of size 6.*; lower data.train_examples$"),
        (dict(name="maze", size=11, path_lengths=(90, 95)), "hardly ever have paths"),
        (dict(name="sudoku", size=4, grades=(5, 9)), r"too few different puzzles sudoku.*, or widen data.grades$"),
        (
            dict(name="sudoku", size=4, clues=15, valid_examples=500),
            r"too few different puzzles sudoku.*, or change data.clues$",
        ),
        (dict(name="prefix_sums", size=1_000_001, train_examples=10_000), "have more than 4294967296 cells: take fewer"),
    ],
)
def test_puzzles_that_do_not_exist_end_the_search(options, message):
    with pytest.raises(UserError, match=message):
        load_puzzles(PuzzleOptions(**SMALL | options))


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [("maze", 30, CHUNK), ("prefix_sums", 4096, CHUNK), ("prefix_sums", 2**20, 16), ("maze", 1024, 16)],
)
def test_large_puzzles_are_generated_fewer_at_a_time(name, size, count, monkeypatch):
    """The sizes that the configs train on are generated as they always were, which their training sets depend on."""
    asked = []
    generate = lambda options, size, count, random: asked.append(count)  # noqa: E731
    monkeypatch.setitem(PUZZLES, name, module.dataclasses.replace(PUZZLES[name], generate=generate))
    next(module._chunks(PUZZLES[name], PuzzleOptions(name=name, size=size), size))
    assert asked == [count]
