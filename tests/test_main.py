"""The main command, run from a command line."""

import json
from functools import partial
from pathlib import Path

import pytest

from deq_flax.config import flattened, resolve, to_dict
from deq_flax.config_files import load_config
from deq_flax.main import MAY_CHANGE, _described, _keep, _table
from deq_flax.run_log.results import write_evaluation
from deq_flax.train.evaluate import Evaluation
from tests.cases import others_slow
from tests.commands import ROOT, command, commands
from tests.test_configs import resolved
from tests.test_configs_vision import get

main = partial(command, "main", timeout=280)
QUICK = [
    f"--config.{option}"
    for option in (
        "train.steps=4",
        "train.eval_every=0",
        "train.log_every=2",
        "deq.pretrain_steps=0",
        "deq.jacobian_frequency=0",
        "model.d_model=16",
        "model.d_embed=16",
        "model.n_head=2",
        "model.d_head=8",
        "model.d_inner=16",
        "model.mem_len=8",
        "data.seq_len=8",
        "data.eval_batch_size=64",
    )
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a tiny run from the command line, and its finished process."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    return workdir, main("--config", "configs/wt103.py:tiny", "--workdir", str(workdir), *QUICK)


def test_training_prints_its_result(trained):
    workdir, result = trained
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("done: best checkpoint, step 4 | valid loss") and "unigram_ppl" in last and "test loss" in last
    for name in ("metrics.jsonl", "config.json", "vocabulary.txt"):
        assert (workdir / name).exists()


@pytest.mark.slow
def test_the_same_command_again_reports_that_the_run_is_complete(trained):
    workdir, first = trained
    again = main("--workdir", str(workdir))  # the config is the run's own
    assert again.returncode == 0 and "this run is complete" in again.stdout
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


@pytest.mark.slow
def test_eval_takes_the_config_of_the_run_and_leaves_results_for_programs(trained):
    workdir, first = trained
    before, trained_result = (workdir / "metrics.jsonl").read_text(), json.loads((workdir / "eval.json").read_text())
    result = main("--mode", "eval", "--workdir", workdir, "--config.eval.max_steps_sweep=0,16", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1].split("|")[1:] == first.stdout.splitlines()[-1].split("|")[1:]
    found = json.loads((workdir / "eval.json").read_text())
    assert json.loads(result.stdout) == found and found["metrics"] == trained_result["metrics"]
    assert (found["step"], found["limits"]) == (4, {"max_steps": 16, "tol": 1e-3, "stop": "relative"})
    assert found["config"]["eval"]["max_steps_sweep"] == [0, 16]
    assert [(row["split"], row["max_steps"]) for row in found["sweep"]] == [
        ("valid", 0), ("test", 0), ("valid", 16), ("test", 16),
    ]  # fmt: skip
    start = found["sweep"][0]
    assert (start["forward_nfe"], start["forward_residual"]) == (1, 1.0), "the initial guess is zero"
    text = (workdir / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.removeprefix(before).splitlines()]
    head = {"step": 4, "mode": "eval"}
    assert rows == [head | {"split": split} | found["metrics"][split] for split in ("valid", "test")] + [
        head | row for row in found["sweep"]
    ]
    assert text.startswith(before) and f"{found['metrics']['test']['loss']:.4g}" in first.stdout


def test_a_disk_that_refuses_an_evaluation_costs_a_warning_and_no_result(tmp_path, caplog):
    (tmp_path / "eval.json").mkdir()
    _keep({"step": 1, "metrics": {}, "sweep": []}, tmp_path, write_evaluation)
    assert caplog.text.count("cannot write the evaluation") == 1 and "Is a directory" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_a_workdir_of_another_config_is_not_changed(trained):
    workdir, _ = trained
    before = (workdir / "config.json").read_bytes()
    result = main(
        "--config", "configs/wt103.py:tiny", "--workdir", str(workdir), *QUICK, "--config.optimizer.learning_rate=0.5"
    )
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "another config, which differs in optimizer.learning_rate (0.0015 there, 0.5 here):" in result.stderr
    assert (workdir / "config.json").read_bytes() == before
    assert json.loads(before)["optimizer"]["learning_rate"] != 0.5


def test_an_evaluation_is_kept_with_the_limit_that_it_was_made_under():
    """Training stops after 40 applications in `maze`, evaluation after 300."""
    config = resolve(load_config("maze"))
    found = _described(Path("run"), Evaluation(step=1, metrics={}, sweep=[]), config)
    assert found["limits"] == {"max_steps": 300, "tol": 1e-4, "stop": "relative"} and config.deq.max_steps == 40


def test_keys_that_may_change_exist():
    keys = {key for config in (resolved("wt103", "tiny"), get("digits", None)) for key, _ in flattened(to_dict(config))}
    for name in MAY_CHANGE:
        assert any(key.startswith(name) for key in keys), name
    assert not {"train.seed", "train.steps", "train.accumulate", "data.name", "data.batch_size"} & set(MAY_CHANGE)


def test_a_table_has_a_column_for_every_key():
    lines = _table([{"split": "valid", "loss": 0.5}, {"split": "test", "loss": 0.25, "skipped_images": 1.0}]).splitlines()
    assert [line.split() for line in lines] == [["split", "loss", "skipped_images"], ["valid", "0.5"], ["test", "0.25", "1"]]


def bad_inputs(tmp_path):
    """{name: (arguments, text that the error line must contain)}."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "broken").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "broken" / f"{split}.npy").write_bytes(b"not an array")
    tiny = ["--config", "configs/wt103.py:tiny", "--workdir", str(tmp_path / "run")]
    return {
        "unknown variant": (["--config", "configs/wt103.py:huge", "--workdir", "x"], "known: base"),
        "no such config": (["--config", "configs/none.py", "--workdir", "x"], "no such file"),
        "no workdir": (tiny[:2], "--workdir"),
        "misspelled key": ([*tiny, "--config.modle.d_model=3"], "did you mean"),
        "wrong type": ([*tiny, "--config.train.steps=many"], "steps"),
        "sequence length 0": ([*tiny, "--config.data.seq_len=0"], "seq_len"),
        "cutoffs out of order": ([*tiny, "--config.model.cutoffs=900,300"], "cutoffs"),
        "missing data": (["--config", "configs/wt103.py", "--workdir", "x", f"--config.data.path={tmp_path}/none"], "WikiText"),
        "missing PTB": (["--config", "configs/ptb.py", "--workdir", "x", f"--config.data.path={tmp_path}/none"], "Treebank"),
        "missing MNIST": (
            ["--config", "configs/mnist.py", "--workdir", "x", f"--config.data.path={tmp_path}"],
            "MNIST database",
        ),
        "missing CamVid": (["--config", "configs/camvid.py", "--workdir", "x", f"--config.data.path={tmp_path}"], "CamVid"),
        "no such augmentation": (
            ["--config", "configs/digits.py", "--workdir", str(tmp_path / "run"), "--config.data.augment=rotate"],
            "known: none, crop",
        ),
        "unreadable data": ([*tiny, "--config.data.name=tokens", f"--config.data.path={tmp_path}/broken"], "train.npy"),
        "workdir not writable": ([*tiny[:2], "--workdir", str(tmp_path / "file" / "run")], "cannot write"),
        "unknown mode": ([*tiny, "--mode", "dance"], "dance"),
        "eval without checkpoint": ([*tiny, "--mode", "eval"], "no checkpoint"),
        "sweep above the limit": ([*tiny, "--mode", "eval", "--config.eval.max_steps_sweep=2,17"], "deq.max_steps (16)"),
        "sweep without an equilibrium": (
            ["--config", "configs/ptb.py:explicit", "--workdir", "x", "--mode", "eval", "--config.eval.max_steps_sweep=4"],
            "no equilibrium",
        ),
        "batch that cannot be split": ([*tiny, "--config.train.accumulate=5"], "must be a multiple of"),
        "more devices than there are": ([*tiny, "--config.mesh.data=4096"], "there are"),
        "unknown optimizer": ([*tiny, "--config.optimizer.name=adem"], "known: adam"),
    }


@pytest.mark.parametrize("part", others_slow(range(3), [0]))
def test_every_user_error_is_one_line_with_exit_code_2_and_leaves_no_files(tmp_path, part):
    cases = dict(list(bad_inputs(tmp_path).items())[part::3])
    results = commands("main", [arguments for arguments, _ in cases.values()])
    for (name, (_, mentioned)), result in zip(cases.items(), results, strict=True):
        out, err = result.stdout, result.stderr
        lines = [line for line in err.splitlines() if line.strip()]
        assert result.returncode == 2, (name, out, err)
        assert len(lines) == 1 and lines[0].startswith("error: "), (name, err)
        assert mentioned in lines[0], (name, err)
        assert "compiling" not in out, name
    assert not (tmp_path / "run").exists() and not (ROOT / "x").exists()
