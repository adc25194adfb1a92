"""The main command in real processes, on a run small enough to be killed and restarted many times."""

import json
import os
import signal
import subprocess
import sys

from tests.commands import CACHE, ROOT

OPTIONS = {
    "train.log_every": 1,
    "train.eval_every": 6,
    "train.checkpoint_every": 2,
    "deq.pretrain_steps": 3,
    "deq.solver": "picard",  # the others amplify rounding, which differs with the number of devices
    "deq.max_steps": 6,
    "deq.max_steps_jitter": 1,
    "deq.backward_solver": "picard",
    "deq.backward_max_steps": 6,
    "deq.jacobian_weight": 0.0,
    "model.dropout": 0.0,
    "model.d_model": 16,
    "model.d_embed": 16,
    "model.n_head": 2,
    "model.d_head": 8,
    "model.d_inner": 16,
    "model.mem_len": 8,
    "data.seq_len": 8,
    "data.eval_batch_size": 64,
}


def arguments(workdir, **options):
    """Arguments of deq_flax.main; options by their keys, with __ in place of a dot."""
    changed = OPTIONS | {name.replace("__", "."): value for name, value in options.items()}
    flags = [f"--config.{name}={value}" for name, value in changed.items()]
    return ["--config", "configs/wt103.py:tiny", "--workdir", str(workdir), *flags]


def start(program, *arguments, devices=1, **environment):
    """Start a process whose output is read line by line."""
    settings = {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [*program, *arguments],
        cwd=ROOT,
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that `finish` can end all of it
    )


def one_process(*arguments, **options):
    return start([sys.executable, "-m", "deq_flax.main"], *arguments, **options)


def several(count, *arguments, **options):
    return start(["launch/local.sh", str(count)], *arguments, **options)


def finish(process, timeout=240):
    """Wait for a process; returns its exit code and output. One that hangs is killed, with all that it started."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after {timeout} seconds:\n" + process.communicate()[0]) from None
    return process.returncode, out


def read_until(process, text):
    """Read lines up to the first that contains `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in:\n" + "".join(lines))


def metrics(workdir):
    """The lines of metrics.jsonl without the numbers that depend on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if not name.endswith("_per_second")} for line in lines]
