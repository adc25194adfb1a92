"""Lines of metrics.jsonl that a run did not write: a run that continues drops them, a reader names the first."""

import json
import os

import pytest

from deq_flax.errors import UserError
from deq_flax.run_log.metrics_file import lines_up_to, read_metrics
from deq_flax.run_log.run_log import RunLog

GOOD = [{"step": step, "split": "train", "loss": 1.5} for step in (1, 2, 3)]
STRANGE = [
    "[]",
    "3",
    "null",
    '"x"',
    "{}",
    "[" * 100_000,
    '{"step":' * 100_000 + "1" + "}" * 100_000,
    '{"step": 2, "split": "train", "loss": ' + "[" * 400 + "]" * 400 + "}",
    '{"step": "2", "split": "train"}',
    '{"step": true, "split": "train"}',
    '{"step": 1.5, "split": "train"}',
    '{"step": NaN, "split": "train"}',
    '{"step": -1, "split": "train"}',
    f'{{"step": {10**400}, "split": "train"}}',
    f'{{"step": 1{"0" * 5000}, "split": "train"}}',
    '{"step": 2, "split": ["train"]}',
    '{"step": 2, "split": "train", "mode": 1}',
    '{"step": 2, "split": "train", "loss": "1"}',
    '{"step": 2, "split": "train", "loss": [1]}',
    '{"step": 2, "split": "train", "loss": true}',
    '{"step": 2, "split": "train", "loss": Infinity}',
    f'{{"step": 2, "split": "train", "loss": {10**400}}}',
    '{"step": 2, "split": "' + "a" * (1 << 20) + '"}',
    "\x00" * 100,
]


@pytest.mark.parametrize("number", range(len(STRANGE)))
def test_other_json_among_the_lines(tmp_path, number):
    lines = [*map(json.dumps, GOOD[:2]), STRANGE[number], json.dumps(GOOD[2])]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match="line 3 is no line of metrics") as caught:
        read_metrics(tmp_path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    kept = lines_up_to(tmp_path / "metrics.jsonl", 9)
    assert [json.loads(line) for line in kept.splitlines()] == GOOD
    with RunLog(tmp_path, 2) as log:
        log.write(5, "valid", {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 5]


def test_a_pipe_is_no_log(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="not a file"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="not a file"):
        RunLog(tmp_path, 3)


def test_lines_of_evaluations_are_those_of_the_test_split(tmp_path):
    rows = [GOOD[0], *({"step": 3, "split": split, "mode": "eval", "loss": 1.0} for split in ("valid", "test"))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[2] | {"max_steps": 4}]))
    assert list(read_metrics(tmp_path)) == [rows[0], rows[2]]
