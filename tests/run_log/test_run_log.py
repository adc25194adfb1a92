"""Laws of the run log: every step once, valid JSON always, and a failing disk never stops a run."""

import io
import json
import math
import resource
import signal
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from deq_flax.errors import UserError
from deq_flax.run_log.results import append_evaluation
from deq_flax.run_log.run_log import RunLog, SilentRunLog


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """Every event of every file, in the order of their names: a record is length, checksum, event, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.name.split(".")[-2]):
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            found.append(Event.FromString(raw[12 : 12 + length]))
            raw = raw[16 + length :]
    return found


def test_lines_are_valid_json_with_seven_digits(tmp_path):
    with RunLog(tmp_path / "new" / "run", None) as log:
        log.write(3, "train", {"loss": jnp.float32(1 / 3), "n": np.int64(4), "bad": math.nan, "worse": -math.inf})
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "split": "train", "loss": 0.3333333, "n": 4, "bad": null, "worse": null}\n'


def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path):
    with RunLog(tmp_path, None) as log:
        for step in (10, 20, 30):
            log.write(step, "train", {"loss": 1.0})
            log.write(step, "valid", {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "split": "tra')
    with RunLog(tmp_path, 20) as log:
        log.write(30, "train", {"loss": 3.0})
    expected = [(10, "train"), (10, "valid"), (20, "train"), (20, "valid"), (30, "train")]
    assert [(line["step"], line["split"]) for line in lines(tmp_path)] == expected


def test_a_new_run_starts_an_empty_file(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path, None) as log:
            log.write(0, "valid", {"loss": 1.0})
            log.write(9, "train", {"loss": 1.0})
    assert [(line["step"], line["split"]) for line in lines(tmp_path)] == [(0, "valid"), (9, "train")]


def test_config_is_written_whole(tmp_path):
    config = {"model": {"cutoffs": (1, 2)}, "task": "language"}
    with RunLog(tmp_path, None) as log:
        log.write_config(config)
        log.write_config(config)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model": {"cutoffs": [1, 2]}, "task": "language"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "tensorboard"]
    assert any(b"cutoffs" in value.tensor.string_val[0] for event in events(tmp_path) for value in event.summary.value)


def test_events_carry_the_numbers_and_purge_on_resume(tmp_path):
    for resume_step in (None, 1):
        with RunLog(tmp_path, resume_step) as log:
            log.write(2, "train", {"loss": 1.5})
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [(2, "train/loss", 1.5)] * 2
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [0, 2]


def test_a_full_disk_warns_once_and_the_run_continues(tmp_path, caplog):
    old_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, None) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
            for step in range(20):
                log.write(step, "train", {"loss": 1.0})
            assert not log.flush()
            log.write_config({"text": "x" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old_signal)
        assert log.flush()
        log.write(99, "train", {"loss": 1.0})
    assert len(caplog.records) == 1 and "training continues" in caplog.records[0].getMessage()
    assert [line["step"] for line in lines(tmp_path)] == [*range(20), 99]


def test_an_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the workdir"):
        RunLog(tmp_path / "file" / "run", None)


def test_a_text_file_is_written_in_utf_8(tmp_path):
    with RunLog(tmp_path, None) as log:
        log.write_text("vocabulary.txt", "the\ncafé\n<eos>\n")
    assert (tmp_path / "vocabulary.txt").read_text(encoding="utf-8") == "the\ncafé\n<eos>\n"


def test_a_picture_is_a_file_and_an_event(tmp_path):
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    with RunLog(tmp_path, None) as log:
        log.write_picture(12, "predictions", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "pictures" / "predictions-0000012.png")), picture)
    images = [(event.step, value.tag) for event in events(tmp_path) for value in event.summary.value]
    assert images == [(12, "predictions")]


def test_the_silent_log_has_every_method_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = {name for name in vars(RunLog) if not name.startswith("_")}
    assert own <= set(vars(SilentRunLog))
    with SilentRunLog() as log:
        log.write(1, "train", {"loss": 1.0})
        log.write_config({})
        log.print_progress(1, 2, {"loss": 1.0})
        assert log.flush()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


@pytest.mark.parametrize(
    "before", [None, b"", b'{"step": 5, "spl', b'{"step": 5, "split": "train"}\n', b'{"step": 5, "split": "train"}\n{"st']
)
def test_an_evaluation_is_appended_after_the_last_whole_line(tmp_path, before):
    path = tmp_path / "run" / "metrics.jsonl"
    if before is not None:
        path.parent.mkdir()
        path.write_bytes(before)
    sweep = [{"split": "test", "max_steps": 2, "loss": math.inf}]
    append_evaluation(path.parent, {"step": 4, "metrics": {"valid": {"loss": 1 / 3}}, "sweep": sweep})
    whole = [{"step": 5, "split": "train"}] * (b"\n" in (before or b""))
    head = {"step": 4, "mode": "eval"}
    assert lines(path.parent) == [*whole, head | {"split": "valid", "loss": 1 / 3}, head | sweep[0] | {"loss": None}]


def test_on_a_terminal_training_is_one_line_that_other_output_leaves_alone(tmp_path, monkeypatch):
    """What a terminal of 40 columns shows in the end, and what it has shown."""
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    with RunLog(tmp_path, None) as log:
        log.print("compiling: equilibrium")
        for step in (1, 2, 3):
            log.print_progress(step, 9, {"loss": 1.0, "forward_nfe": 3.0, "forward_residual": 0.1, "grad_norm": 1.0})
        log.end_line()
        log.print_progress(3, 9, {"loss": 2.0}, "valid")
        log.print_progress(4, 9, {"loss": 0.5})
    text = screen.getvalue()
    assert text.count("\r") == 4 and all(len(part) < 40 + len("\x1b[K") for part in text.replace("\r", "\n").split("\n"))
    shown = [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]
    assert shown == [
        "compiling: equilibrium",
        "step 3/9  loss 1.000  fwd 3.0 evals 1.0",
        "valid step 3/9  loss 2.000",
        "step 4/9  loss 0.500",
        "",
    ]
