"""Several processes as one run, as on several machines: joining, agreeing, and leaving.

Every process runs the same program on its own devices. The first one writes files and speaks; all of them solve, and write
their parts of checkpoints.
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
"""The coordinator that means: ask the cluster."""


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Generator[None]:
    """Within it, JAX knows the devices of all processes. Enter before anything else uses JAX; None: this process is alone.

    Args:
      coordinator: HOST:PORT of process 0, which all can reach; or 'auto' under Slurm, Open MPI, on Cloud TPU and in a
        Kubernetes JobSet, where JAX knows the rest.
      num_processes, process_id: how many there are, and which of them, from 0, this is; not with 'auto'.

    An exception ends the process at once, with what would have been its exit code: the others wait for it in collectives, and
    only its death tells them.

    Raises:
      UserError: the arguments do not go together, or the others cannot be reached.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise UserError("--num_processes and --process_id go with --coordinator HOST:PORT")
        yield
        return
    _join(coordinator, num_processes, process_id)
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


def _join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
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
    """Whether this process writes the run's files and speaks."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once however many processes there are."""
    if is_first():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Returns once all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
