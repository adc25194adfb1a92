"""The scripts in launch/: the commands that a dry run prints, and real runs with stand-ins for a cluster's commands."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from tests.commands import ROOT
from tests.train.commands import arguments, finish, metrics, read_until, start

TPU = {"NAME": "deq", "TYPE": "v5litepod-16", "ZONE": "us-west4-a", "REPOSITORY": str(ROOT)}


@pytest.fixture
def cluster(tmp_path):
    """Environment variables that put stand-ins for a cluster's commands on PATH, which log their calls to the file `log`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = f"#!{sys.executable}\n" + (ROOT / "tests" / "stand_ins.py").read_text()
    for name in ("srun", "scontrol", "gcloud", "kubectl"):
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    for name in ("pip", "git"):  # on a worker: nothing to install, and a link to this repository in place of a clone
        (folder / name).write_text(f'#!/bin/sh\ntest {name} = pip || ln -s "$2" "$3"\n')
        (folder / name).chmod(0o755)
    (folder / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python3").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "STAND_IN_LOG": str(tmp_path / "log"), "POLL": "0.1"}


def dry_run(script, *more, **environment):
    result = subprocess.run(
        ["bash", f"launch/{script}", "--dry-run", *more, "--config", "configs/wt103.py", "--workdir", "a b"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": "python3", "PORT": "1234"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_dry_runs_print_what_would_be_started():
    run = "-m deq_flax.main --config configs/wt103.py --workdir a\\ b --coordinator"
    local = [f"python3 {run} localhost:1234 --num_processes 2 --process_id {i} " for i in range(2)]
    assert dry_run("local.sh", "2") == local
    assert dry_run("slurm.sbatch") == [f"srun --kill-on-bad-exit=1 python3 {run} auto "]
    lines = dry_run("tpu_pod.sh", **TPU)
    assert [line.split()[3:5] for line in lines] == [
        ["queued-resources", "create"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
        ["queued-resources", "delete"],
    ]
    assert all("us-west4-a" in line for line in lines)


@pytest.mark.parametrize(("script", "environment"), [("tpu_pod.sh", TPU), ("gke_jobset.sh", {"IMAGE": "image"})])
def test_nothing_is_requested_for_a_run_that_does_not_fit(script, environment, cluster, tmp_path):
    check = tmp_path / "check"
    check.write_text('#!/bin/sh\necho "$@"; exit 2\n')
    check.chmod(0o755)
    environment = os.environ | environment | cluster | {"CHECK": "1", "PYTHON": str(check)}
    command = ["bash", f"launch/{script}", "--config", "configs/wt103.py", "--workdir", "a b"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and not (tmp_path / "log").exists()
    kind = "v5litepod-16" if script == "tpu_pod.sh" else "v5e:4x4"
    assert (
        result.stdout.split()
        == f"-m deq_flax.compile --must_fit --topology {kind} --config configs/wt103.py --workdir a b".split()
    )


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh", "gke_jobset.sh"])
def test_a_missing_argument_is_one_line(script):
    result = subprocess.run(["bash", f"launch/{script}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and not result.stdout


def test_scripts_hold_no_hyperparameters_and_are_clean():
    scripts = [*(ROOT / "launch").glob("*.s*")]
    assert len(scripts) == 4
    for script in scripts:
        assert "--config." not in script.read_text()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *scripts], check=True)


def test_the_jobset_runs_the_command_in_every_pod():
    job = yaml.safe_load("\n".join(dry_run("gke_jobset.sh", "--config.data.path", 'a "path"', IMAGE="place/image&more:1")))
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["image"] == "place/image&more:1"
    assert [*container["command"], *container["args"]][2:] == [
        *("deq_flax.main", "--coordinator", "auto", "--config.data.path", 'a "path"'),
        *("--config", "configs/wt103.py", "--workdir", "a b"),
    ]
    assert spec["parallelism"] == spec["completions"]


@pytest.mark.faults
def test_a_slurm_job_saves_before_its_limit_and_is_queued_again(cluster, tmp_path):
    run = arguments(tmp_path / "run", train__steps=20)
    job = start(["bash", "launch/slurm.sbatch"], *run, SLURM_JOB_ID="7", **cluster)
    read_until(job, "step  5/20")
    job.send_signal(signal.SIGTERM)
    code, out = finish(job)
    assert code == 0 and "stopped at step" in out, out
    assert (tmp_path / "log").read_text().splitlines()[-1] == "scontrol requeue 7"
    code, out = finish(start(["bash", "launch/slurm.sbatch"], *run, SLURM_JOB_ID="7", **cluster))
    assert code == 0 and "done: best" in out, out
    assert (tmp_path / "log").read_text().count("scontrol") == 1
    assert [line["step"] for line in metrics(tmp_path / "run") if line["split"] == "train"] == list(range(1, 21))


@pytest.mark.faults
def test_a_preempted_slice_is_requested_again(cluster, tmp_path):
    run = arguments(tmp_path / "run", train__steps=60)
    code, out = finish(start(["bash", "launch/tpu_pod.sh"], *run, **TPU, **cluster, PREEMPTED_AFTER="18"))
    assert code == 0 and out.count("done: best") == 1, out
    calls = [line.split()[4] for line in (tmp_path / "log").read_text().splitlines() if " describe " not in line]
    assert calls == ["create", "ssh", "ssh", "delete", "create", "ssh", "ssh", "delete"]
    assert [line["step"] for line in metrics(tmp_path / "run") if line["split"] == "train"] == list(range(1, 61))
