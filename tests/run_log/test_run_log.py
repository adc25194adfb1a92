"""Laws of the report: every step once, valid JSON always, and a failing disk never stops a run."""

import json
import math
import resource
import signal
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from deq_flax.errors import UserError
from deq_flax.run_log.run_log import Clock, Report, progress_line


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
    with Report(tmp_path / "new" / "run", None) as report:
        report.write(3, "train", {"loss": jnp.float32(1 / 3), "n": np.int64(4), "bad": math.nan, "worse": -math.inf})
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "split": "train", "loss": 0.3333333, "n": 4, "bad": null, "worse": null}\n'


def test_resuming_drops_what_will_be_written_again(tmp_path):
    with Report(tmp_path, None) as report:
        for step in (10, 20, 30):
            report.write(step, "train", {"loss": 1.0})
            report.write(step, "valid", {"loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "split": "tra')
    with Report(tmp_path, 20) as report:
        report.write(30, "train", {"loss": 3.0})
    expected = [(10, "train"), (10, "valid"), (20, "train"), (20, "valid"), (30, "train")]
    assert [(line["step"], line["split"]) for line in lines(tmp_path)] == expected


def test_a_fresh_run_starts_an_empty_file_and_an_evaluation_adds_to_it(tmp_path):
    for _ in range(2):
        with Report(tmp_path, None) as report:
            report.write(0, "valid", {"loss": 1.0})
            report.write(9, "train", {"loss": 1.0})
    with Report(tmp_path, 4, keep=True) as report:
        report.write(4, "test", {"loss": 2.0})
    assert [(line["step"], line["split"]) for line in lines(tmp_path)] == [(0, "valid"), (9, "train"), (4, "test")]


def test_config_is_written_whole(tmp_path):
    config = {"model": {"cutoffs": (1, 2)}, "task": "language"}
    with Report(tmp_path, None) as report:
        report.write_config(config)
        report.write_config(config)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model": {"cutoffs": [1, 2]}, "task": "language"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "tensorboard"]
    assert any(b"cutoffs" in value.tensor.string_val[0] for event in events(tmp_path) for value in event.summary.value)


def test_events_carry_the_numbers_and_purge_on_resume(tmp_path):
    for resume_step in (None, 1):
        with Report(tmp_path, resume_step) as report:
            report.write(2, "train", {"loss": 1.5})
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert scalars == [(2, "train/loss", 1.5)] * 2
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [0, 2]


def test_a_full_disk_warns_once_and_the_run_goes_on(tmp_path, caplog):
    old_signal = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Report(tmp_path, None) as report:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
            for step in range(20):
                report.write(step, "train", {"loss": 1.0})
            report.write_config({"text": "x" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, old_signal)
        report.write(99, "train", {"loss": 1.0})
    assert len(caplog.records) == 1 and "the run goes on" in caplog.records[0].getMessage()
    assert [line["step"] for line in lines(tmp_path)][-1] == 99  # and no torn line in between


def test_an_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the workdir"):
        Report(tmp_path / "file" / "run", None)


METRICS = {
    "loss": 4.2131,
    "ppl": 67.52,
    "forward_nfe": 17.2,
    "forward_residual": 6.1e-4,
    "backward_nfe": 15.0,
    "backward_residual": 8e-4,
    "grad_norm": 0.921,
    "learning_rate": 9.8e-4,
    "tokens_per_second": 21300.0,
    "steps_per_second": 480 / 65,
}


def test_progress_line():
    assert progress_line(120, 600, METRICS) == (
        "step 120/600  loss 4.213  ppl 67.52  fwd 17.2 evals 6.1e-04  bwd 15.0 evals 8.0e-04  "
        "grad 0.92  lr 9.8e-04  21.3k tok/s  ETA 1m05s"
    )


@pytest.mark.parametrize("missing", [*METRICS, "everything"])
def test_progress_line_without_some_metric(missing, tmp_path, capsys):
    metrics = {} if missing == "everything" else {name: x for name, x in METRICS.items() if name != missing}
    with Report(tmp_path, None) as report:
        report.line(5, 600, metrics | {"loss": math.nan}, "valid")
    out = capsys.readouterr().out
    assert out.startswith("valid step   5/600  loss nan") and out.count("\n") == 1
    assert ("bwd" in out) == (missing not in ("backward_nfe", "backward_residual", "everything"))


def test_clock_leaves_pauses_out():
    clock = Clock()
    start = time.perf_counter()
    with clock.pause():
        time.sleep(0.05)
    seconds, all_seconds = clock.lap(), time.perf_counter() - start
    assert 0 < seconds <= all_seconds - 0.05
    assert clock.lap() < 0.05
