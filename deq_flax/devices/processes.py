"""Several processes, on one machine or many, as one run: start, synchronization, exit.

Every process runs the same program on its own devices. All of them solve and write their shards of checkpoints; the first one
writes the other files and prints.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Generator

import jax
from jax.experimental import multihost_utils

from deq_flax.errors import UserError

AUTO = "auto"
"""The value of --coordinator with which JAX takes coordinator and processes from the cluster's environment."""
PATIENCE = 60
"""Seconds to wait for the other processes by default."""

_LOST = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|[Gg]loo|[Hh]eartbeat|[Cc]onnection (?:reset|closed|refused)|Socket closed"
)
"""Words by which to recognize the errors of a collective after another process has ended."""

_log = logging.getLogger("deq_flax")


@contextlib.contextmanager
def distributed(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, patience: int = PATIENCE
) -> Generator[None]:
    """Initialize JAX's distributed runtime for the length of a `with` block, so that all processes' devices are known.

    Enter it before anything else uses JAX. Without a coordinator it does nothing.

    Args:
      coordinator: HOST:PORT of process 0, which all must be able to reach; 'auto' under Slurm, Open MPI, on Cloud TPU and in a
        Kubernetes JobSet; None for a single process.
      num_processes, process_id: the number of processes, and the index of this one, from 0; not with 'auto'.
      patience: seconds to wait for the other processes at the start, and for a sign of life from each of them later.

    An exception in the block ends the process at once, with its usual exit code: the other processes wait for this one in
    collectives, and only the loss of its connection ends them. They say so in one line and exit with code 1. If not all
    processes are there after `patience` seconds, this one ends with one line and code 2.

    Raises:
      UserError: the arguments contradict each other, or the address cannot be used.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise UserError("--num_processes and --process_id go with --coordinator HOST:PORT")
        yield
        return
    if patience < 1:
        raise UserError(f"--patience is in seconds, at least 1, not {patience}")
    _initialize(coordinator, num_processes, process_id, patience)
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            print(f"error: process {jax.process_index()}: {error}", file=sys.stderr, flush=True)
            os._exit(2)
        if isinstance(error, KeyboardInterrupt):
            os._exit(130)
        if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
            reason = " ".join(str(error).split())[:300]
            print(
                f"error: process {jax.process_index()}: another process has ended or cannot be reached ({reason})",
                file=sys.stderr,
            )
        else:
            traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)
    jax.distributed.shutdown()


def _initialize(coordinator: str, num_processes: int | None, process_id: int | None, patience: int) -> None:
    if coordinator == AUTO:
        if num_processes is not None or process_id is not None:
            raise UserError(f"--coordinator {AUTO} finds --num_processes and --process_id by itself: leave them out")
    else:
        if num_processes is None or process_id is None:
            raise UserError(f"--coordinator HOST:PORT needs --num_processes and --process_id; or let --coordinator {AUTO} ask")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id must be from 0 to {num_processes - 1}, not {process_id}")
        host, _, port = coordinator.rpartition(":")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise UserError(f"--coordinator must be HOST:PORT or {AUTO}, not {coordinator!r}")
    address = None if coordinator == AUTO else coordinator
    who = "" if process_id is None else f"process {process_id}: "
    late = f"{who}the other processes have not all answered within {patience} seconds (--coordinator {coordinator}): " + (
        "is that the address of process 0, and is each process running? --patience SECONDS waits longer"
    )
    try:
        # JAX ends the process with a stack of C++ when its own time is over: ours is over first.
        with _ending_after(patience, late):
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                initialization_timeout=patience + 60,
                heartbeat_timeout_seconds=max(patience, 10),
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes (--coordinator {coordinator}): {error}") from error


@contextlib.contextmanager
def _ending_after(seconds: float, message: str) -> Generator[None]:
    """End the process with one line and code 2 unless the block is left in time, whatever it waits for."""

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_first() -> bool:
    """Return True in the process that writes the run's files and prints."""
    return jax.process_index() == 0


def print_once(text: str, end: str = "\n") -> None:
    """Print text in the first process only. If standard output takes nothing more, that is logged once; nothing is raised."""
    if not is_first():
        return
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        _log.warning("cannot write to standard output: %s; the run continues, without its reports there", reason)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def barrier(name: str) -> None:
    """Wait until all processes are at the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
