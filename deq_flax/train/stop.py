"""The request of a signal to end a run: SIGTERM and SIGINT, on one process or several."""

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stop:
    """A request of a signal to end the run."""

    received: str = ""
    """Name of the signal; empty before one has been received."""

    def requested(self, step: int) -> bool:
        """Return True if the run is to stop after `step`; to be called after every step.

        Several processes stop after the same step, though the signal reaches each at its own time.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM.name
        return bool(self.received)


@contextmanager
def stop_signal() -> Generator[Stop]:
    """Turn SIGTERM and the first SIGINT into a request to stop after the current step. A second SIGINT interrupts at once."""
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError, ValueError):  # nobody may be reading
            print(f"{signal.Signals(number).name}: finishing the step and saving", file=sys.stderr, flush=True)
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # JAX's preemption notice, which reaches all processes
        else:
            stop.received = signal.Signals(number).name

    # With several processes, SIGTERM is caught by JAX, which notifies the others.
    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
    try:
        before = {number: signal.signal(number, on_signal) for number in numbers}
    except ValueError:  # outside of the main thread Python takes no signal handlers
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
