"""Laws of the training run: resuming, stopping, skipped updates, and evaluation without side effects."""

import json
import logging
import math
import os
import re
import signal

import jax
import numpy as np
import pytest

from deq_flax.checkpoints.checkpoints import Checkpoints
from deq_flax.checkpoints.stored_step import read_record
from deq_flax.config import phases_of, resolve
from deq_flax.errors import UserError
from deq_flax.models.transformer_xl import TransformerXL
from deq_flax.pretrained import load_model
from deq_flax.train import loop
from deq_flax.train.step import _joined, _micro_batches
from tests.cases import others_slow
from tests.train.commands import metrics
from tests.train.small import ChangedBatches, arrays, config, explicit, make_run, run, write_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def first_run(folder, tmp_path_factory):
    """The run that the others are compared with, and what JAX has logged of its compilation."""
    workdir, messages = tmp_path_factory.mktemp("whole"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    jax.clear_caches()
    try:
        with jax.log_compiles():
            run(config(folder), workdir)
    finally:
        logger.removeHandler(handler)
    return workdir, messages


@pytest.fixture(scope="module")
def uninterrupted(first_run):
    return first_run[0]


def crash_at(*steps):
    def crash(number, batch):
        if number in steps:
            raise RuntimeError("crash")
        return batch

    return lambda task: ChangedBatches(task, crash)


@pytest.mark.parametrize("own_steps", others_slow([False, True], [False]))
def test_a_run_crashed_twice_is_bit_identical_to_one_never_stopped(folder, uninterrupted, tmp_path, own_steps):
    """Across the end of pretraining (step 3), with dropout, jitter, Jacobian loss, memory and a running average.

    `own_steps`: the last part compiles its steps, as a new process does.
    """
    for steps in ((3,), (7,)):
        with pytest.raises(RuntimeError, match="crash"):
            run(config(folder), tmp_path, crash_at(*steps))
    run(config(folder), tmp_path, own_steps=own_steps)
    assert metrics(tmp_path) == metrics(uninterrupted)
    assert arrays(tmp_path, 8) == arrays(uninterrupted, 8)


def test_intervals_may_change_when_a_run_is_resumed(folder, uninterrupted, tmp_path):
    """When a run logs, evaluates and saves, and what it keeps, does not change what it learns."""
    with pytest.raises(RuntimeError, match="crash"):
        run(config(folder), tmp_path, crash_at(5))
    intervals, kept = {"log_every": 3, "eval_every": 0, "checkpoint_every": 3}, {"keep_latest": 1, "keep_best": 0}
    run(config(folder, train=intervals, checkpoint=kept), tmp_path)
    assert arrays(tmp_path, 8) == arrays(uninterrupted, 8)
    assert [line["step"] for line in metrics(tmp_path) if line["split"] == "train"] == [1, 2, 3, 4, 6, 8]


def lines_of_a_run_that_resumes(c, tmp_path):
    """Train in `whole`, and in `crashed` with a crash on the way; both must end alike. Returns the lines of metrics.jsonl."""
    with pytest.raises(RuntimeError, match="crash"):
        run(c, tmp_path / "crashed", crash_at(5))
    for name in ("crashed", "whole"):
        run(c, tmp_path / name)
    steps = c["train"]["steps"]
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "whole")
    assert arrays(tmp_path / "crashed", steps) == arrays(tmp_path / "whole", steps)
    return metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_proposal_and_its_refinement_train_and_resume_too(folder, tmp_path):
    """With a consistency loss beside; the refinement learns too."""
    model = {"name": "proposal_deq", "proposal_blocks": 1, "pre_norm": True}
    c = config(folder, model=model, deq={"consistency_weight": 0.1, "pretrain_steps": 2})
    lines = lines_of_a_run_that_resumes(c, tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] and 1 < lines[-1]["forward_nfe"] <= 8
    logged = [line["step"] for line in lines if "consistency_loss" in line]
    assert logged == [3, 4, 5, 6, 7, 8], "of training steps after pretraining"
    scale_D = load_model(tmp_path / "whole").model.scale_D[...]
    assert scale_D.std() > 1e-3, "the scale is learned"


@pytest.mark.slow
def test_explicit_layers_train_and_resume_too(folder, tmp_path):
    c = explicit(config(folder, train={"steps": 12}))
    lines = lines_of_a_run_that_resumes(c, tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] and "forward_nfe" not in lines[0]
    loaded = load_model(tmp_path / "whole")
    assert isinstance(loaded.model, TransformerXL) and len(loaded.model.cells) == 2


def test_a_stop_signal_saves_and_the_run_goes_on_from_there(folder, uninterrupted, tmp_path):
    def terminate(number, batch):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    result = run(config(folder), tmp_path, lambda task: ChangedBatches(task, terminate))
    assert result.interrupted and result.step == 5
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps()[-1] == 5
    run(config(folder), tmp_path)
    assert metrics(tmp_path) == metrics(uninterrupted)
    assert arrays(tmp_path, 8) == arrays(uninterrupted, 8)


def test_a_stop_between_two_log_lines_leaves_no_trace(folder, tmp_path):
    """The averages after it cover the whole window, across a phase's end too: metrics.jsonl is the same line for line."""

    def terminate(number, batch):
        if number in (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    c = config(folder, train={"log_every": 5, "eval_every": 0, "checkpoint_every": 100})
    stops = [run(c, tmp_path / "stopped", lambda task: ChangedBatches(task, terminate)) for _ in range(2)]
    assert [(stop.interrupted, stop.step) for stop in stops] == [(True, 2), (True, 4)]
    window = read_record(tmp_path / "stopped" / "checkpoints" / "4")["window"]
    assert window["loss"][1] == 4 * 4 * 8  # tokens of four steps
    for name in ("stopped", "whole"):
        run(c, tmp_path / name)
    assert list(map(list, metrics(tmp_path / "stopped"))) == list(map(list, metrics(tmp_path / "whole")))
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_a_workdir_in_use_refuses_a_second_run_and_can_be_evaluated(folder, uninterrupted, tmp_path):
    seen = []

    def meanwhile(number, batch):
        if number == 5:
            with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since .*: wait for it"):
                run(config(folder), tmp_path)
            seen.append(load_model(tmp_path).meta["step"])
        return batch

    run(config(folder), tmp_path, lambda task: ChangedBatches(task, meanwhile))
    assert seen[0] in (2, 4) and metrics(tmp_path) == metrics(uninterrupted)
    assert not (tmp_path / "run.lock").exists()


def test_a_complete_run_is_only_evaluated_again(folder, uninterrupted, tmp_path):
    before = metrics(uninterrupted)
    result = run(config(folder), uninterrupted, crash_at(*range(100)))
    assert result.resumed and set(result.metrics) == {"valid", "test"}
    assert metrics(uninterrupted) == before


def test_the_lines_and_files_of_a_run(uninterrupted):
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["split"] == "valid"] == [4, 8]
    last = [line for line in lines if line["split"] == "train"][-1]
    for name in ("loss", "ppl", "forward_nfe", "forward_residual", "backward_nfe", "backward_residual", "grad_norm"):
        assert np.isfinite(last[name]), name
    assert any("jacobian_loss" in line for line in lines)
    assert not any("backward_nfe" in line for line in lines[:3])  # unrolled: no adjoint solve
    assert json.loads((uninterrupted / "config.json").read_text())["train"]["steps"] == 8
    assert list((uninterrupted / "tensorboard").glob("events*"))


def test_not_finite_updates_are_skipped_and_counted(folder, tmp_path):
    def poison(number, batch):
        return batch | {"mask": batch["mask"] * np.nan} if number in (4, 6) else batch

    run(config(folder), tmp_path, lambda task: ChangedBatches(task, poison))
    lines = {line["step"]: line for line in metrics(tmp_path) if line["split"] == "train"}
    assert lines[5]["skipped"] == 1 and lines[7]["skipped"] == 1 and "skipped" not in lines[6]
    assert "loss" not in lines[5] and np.isfinite(lines[8]["loss"])
    assert np.isfinite([line["loss"] for line in metrics(tmp_path) if line["split"] == "valid"]).all()


def test_too_many_skipped_updates_stop_the_run_and_keep_the_last_good_checkpoint(folder, uninterrupted, tmp_path):
    def poison(number, batch):
        return batch | {"mask": batch["mask"] * np.nan} if number >= 4 else batch

    with pytest.raises(UserError, match="not finite 3 steps in a row"):
        run(config(folder), tmp_path, lambda task: ChangedBatches(task, poison))
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [4, 6]
    assert metrics(tmp_path)[:5] == metrics(uninterrupted)[:5]  # four steps and an evaluation
    assert arrays(tmp_path, 4)["params"] == arrays(tmp_path, 6)["params"]


def test_evaluation_leaves_the_training_state_bit_identical(folder):
    started = make_run(config(folder))
    before = jax.tree.map(np.asarray, started.state)
    first, second = started.evaluate("valid"), started.evaluate("valid")
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, started.state))
    assert first == second


def plain(folder, **train):
    """A config without randomness, so that only the order of arithmetic may differ."""
    return config(
        folder,
        model={"dropout": 0.0, "attention_dropout": 0.0},
        optimizer={"learning_rate": 1e-3},
        deq={"jacobian_weight": 0.0, "max_steps_jitter": 0, "pretrain_steps": 0},
        train={"steps": 5, "eval_every": 0, "checkpoint_every": 5} | train,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference_losses(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain")
    run(plain(folder), workdir)
    return [line["loss"] for line in metrics(workdir)]


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"accumulate": 2}},
        {"mesh": {"data": 4}},
        {"train": {"accumulate": 2}, "mesh": {"data": 1, "fsdp": 2, "tensor": 2}},
    ],
)
@pytest.mark.slow
def test_devices_and_micro_batches_do_not_change_the_result(folder, tmp_path, reference_losses, change):
    c = plain(folder)
    c = {name: section | change.get(name, {}) if name in change else section for name, section in c.items()}
    run(c, tmp_path)
    # Solves of an untrained model end at their limit, which amplifies rounding.
    np.testing.assert_allclose([line["loss"] for line in metrics(tmp_path)], reference_losses, rtol=1e-4)


def test_the_host_reads_a_step_only_after_sending_the_next(folder, tmp_path, monkeypatch):
    events = []
    make = loop.make_train_step

    def recording(*args, **kwargs):
        step = make(*args, **kwargs)

        def send(state, batch, scalars, number, *, phase):
            events.append(("sent", int(number) + 1))
            return step(state, batch, scalars, number, phase=phase)

        return send

    flush = loop.Log.flush

    def read(self):
        if self._pending is not None:
            events.append(("read", self._pending[0]))
        flush(self)

    monkeypatch.setattr(loop, "make_train_step", recording)
    monkeypatch.setattr(loop.Log, "flush", read)
    c = config(folder, deq={"pretrain_steps": 0, "jacobian_weight": 0.0}, train={"eval_every": 0, "checkpoint_every": 8})
    run(c, tmp_path, own_steps=True)
    for step in range(2, 8):
        assert events.index(("read", step)) > events.index(("sent", step + 1))


def test_a_run_compiles_once_for_each_phase_and_once_to_evaluate(folder, first_run):
    """Over a whole run, with jitter, changing weights, padded last batches and two splits."""
    _, messages = first_run
    c = config(folder)
    phases = {phases_of(resolve(c)).phase(n) for n in range(8)}
    assert len(phases) == 3 and "unrolled pretraining" in map(str, phases)
    steps = [message for message in messages if re.match(r"Finished XLA compilation of jit\(step\)", message)]
    assert len(steps) == len(phases) + 1, steps


@pytest.mark.parametrize(
    "change,message",
    [
        ({"train": {"steps": 0}}, "train.steps"),
        ({"train": {"ema_decay": 1.0}}, "ema_decay"),
        ({"train": {"accumulate": 3}}, "multiple"),
        ({"mesh": {"fsdp": 3}}, "fsdp"),
        ({"mesh": {"data": 99}}, "mesh.data"),
        ({"data": {"batch_size": 6}, "mesh": {"data": 4}}, "multiple"),
        ({"data": {"eval_batch_size": 3}, "mesh": {"data": 2}}, "eval_batch_size"),
        ({"deq": {"solver": "newton"}}, "known: picard, anderson, broyden"),
        ({"deq": {"jacobian_frequency": 2.0}}, "probability"),
        ({"deq": {"stop": "rel"}}, "known: relative, absolute"),
        ({"optimizer": {"name": "adamm"}}, "known"),
        ({"model": {"cutoffs": (30, 10)}}, "cutoffs"),
        ({"model": {"dtype": "int8"}}, "dtype"),
        ({"data": {"seq_len": 0}}, "seq_len"),
        ({"data": {"seq_len": 999}}, "seq_len"),
    ],
)
def test_impossible_configs_are_refused_in_one_line(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        run(config(folder, **change), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("shape", [(6, 4), (6, 0, 4), (6,)])
def test_micro_batches_together_are_the_batch_with_empty_axes_too(shape):
    """A memory of length 0 has an empty axis."""
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    parts = _micro_batches(x, 3)
    assert parts.shape == (3, 2, *shape[1:])
    np.testing.assert_array_equal(_joined(parts), x)


@pytest.mark.slow
def test_a_model_without_memory_trains_and_resumes(folder, tmp_path):
    c = config(folder, model={"mem_len": 0}, deq={"pretrain_steps": 0}, train={"steps": 6, "accumulate": 2})
    assert len(lines_of_a_run_that_resumes(c, tmp_path)) > 6
