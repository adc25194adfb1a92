"""Stand-ins for the commands `srun`, `scontrol` and `gcloud` of a cluster, which start local processes instead.

Every call is logged as one line of $STAND_IN_LOG.
"""

import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys

PROCESSES = 2
HERE = pathlib.Path(os.environ.get("STAND_IN_LOG", ".")).parent


def workers(command, directories):
    """Start a process in each directory with the variables that Slurm sets. Returns the largest exit code; forwards SIGTERM."""
    slurm = {
        "SLURM_JOB_ID": str(random.randrange(2**12)),  # from which JAX takes the port
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(len(directories)),
    }
    running = []
    for i, directory in enumerate(directories):
        environment = os.environ | slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        running.append(subprocess.Popen(command, cwd=directory, env=environment, shell=isinstance(command, str)))
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in running])
    return max(abs(process.wait()) for process in running)


def srun(arguments):
    return workers([argument for argument in arguments if not argument.startswith("--kill-on")], ["."] * PROCESSES)


def gcloud(arguments):
    """Imitate a queue that grants a slice at the second request for its state, and preempts the first slice during the run."""
    state, preempted = HERE / "state", HERE / "preempted"
    if "describe" in arguments:
        if not state.exists():
            return 1
        print(state.read_text())
        if state.read_text() == "WAITING_FOR_RESOURCES":
            state.write_text("ACTIVE")
    elif "create" in arguments:
        state.write_text("WAITING_FOR_RESOURCES")
    elif "delete" in arguments:
        state.unlink()
    elif "ssh" in arguments:
        homes = [HERE / f"worker{i}" for i in range(PROCESSES)]
        for home in homes:
            home.mkdir(exist_ok=True)
        command = arguments[arguments.index("--command") + 1]
        if "deq_flax.main" in command and not preempted.exists():
            preempted.touch()
            state.write_text("SUSPENDED")
            return workers(f"exec timeout --signal=KILL {os.environ['PREEMPTED_AFTER']} bash -c {shlex.quote(command)}", homes)
        return workers(command, homes)
    return 0


if __name__ == "__main__":
    name = pathlib.Path(sys.argv[0]).name
    with open(os.environ["STAND_IN_LOG"], "a") as log:
        log.write(f"{name} {shlex.join(sys.argv[1:])}\n")
    sys.exit({"srun": srun, "gcloud": gcloud}.get(name, lambda _: 0)(sys.argv[1:]))
