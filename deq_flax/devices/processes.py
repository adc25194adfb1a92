"""Several processes, on one machine or many, as one run: start, synchronization, exit.

Every process runs the same program on its own devices. All of them solve and write their shards of checkpoints; the first one
writes the other files and prints.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Generator

import jax
from jax.experimental import multihost_utils

from deq_flax.errors import UserError

AUTO = "auto"
"""The value of --coordinator with which JAX takes coordinator and processes from the cluster's environment."""


@contextlib.contextmanager
def distributed(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Generator[None]:
    """Initialize JAX's distributed runtime for the length of a `with` block, so that all processes' devices are known.

    Enter it before anything else uses JAX. Without a coordinator it does nothing.

    Args:
      coordinator: HOST:PORT of process 0, which all must be able to reach; 'auto' under Slurm, Open MPI, on Cloud TPU and in a
        Kubernetes JobSet; None for a single process.
      num_processes, process_id: the number of processes, and which of them, from 0, this one is; not with 'auto'.

    An exception in the block ends the process at once, with its usual exit code: the other processes wait for this one in
    collectives, and only the loss of its connection ends them.

    Raises:
      UserError: the arguments contradict each other, or the other processes cannot be reached.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise UserError("--num_processes and --process_id go with --coordinator HOST:PORT")
        yield
        return
    _initialize(coordinator, num_processes, process_id)
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
        traceback.print_exception(error)
        sys.stderr.flush()
        os._exit(1)
    jax.distributed.shutdown()


def _initialize(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    if coordinator == AUTO:
        if num_processes is not None or process_id is not None:
            raise UserError(f"--coordinator {AUTO} finds --num_processes and --process_id by itself: leave them out")
    else:
        if num_processes is None or process_id is None:
            raise UserError(f"--coordinator HOST:PORT needs --num_processes and --process_id; or let --coordinator {AUTO} ask")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id must be from 0 to {num_processes - 1}, not {process_id}")
        if ":" not in coordinator:
            raise UserError(f"--coordinator must be HOST:PORT or {AUTO}, not {coordinator!r}")
    address = None if coordinator == AUTO else coordinator
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the other processes (--coordinator {coordinator}): {error}") from error


def is_first() -> bool:
    """Return True in the process that writes the run's files and prints."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Print a line in the first process only."""
    if is_first():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Wait until all processes are at the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
