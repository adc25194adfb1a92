"""Saving while a run goes on: a disk that refuses costs a checkpoint, not the run."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import jax

from deq_flax.checkpoints.checkpoints import Checkpoints
from deq_flax.checkpoints.stored_step import DiskError
from deq_flax.run_log.run_log import Report
from deq_flax.train.step import TrainState

REST = ("variables", "opt_state", "carry", "skipped", "skipped_in_all")
"""What a checkpoint's `rest` holds of the state; `params` and `ema` are items of their own."""

LAST_PAUSES = (1, 2, 4, 8)
"""Seconds between attempts at the last save of a process: together less than the grace before it is killed."""

_log = logging.getLogger("deq_flax")


class Saver:
    """Saves a run's state, and remembers whether a save is still owed.

    With several processes a refused save ends the run: they cannot know which of them the disk refused.
    """

    def __init__(self, checkpoints: Checkpoints, report: Report, config: Mapping[str, Any]):
        self._checkpoints, self._report, self._config = checkpoints, report, config
        self._owed = False

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Start a save. A refusal, also of the save before, is warned of, and owed."""
        self._notice_refusal(wait=True)
        try:
            self._write(step, state, metrics)
            self._owed = False
        except DiskError as error:
            self._warn(error)

    def owes(self) -> bool:
        """Whether the disk has refused a save, perhaps in the background since, that is to be made up for."""
        if jax.process_count() == 1:
            self._notice_refusal(wait=False)
        return self._owed

    def save_last(self, step: int, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Save, and return when it is on disk; DiskError if it is refused time and again."""
        self._notice_refusal(wait=True)
        for pause in (*LAST_PAUSES, None):
            try:
                self._write(step, state, metrics)
                return self._checkpoints.wait()
            except DiskError as error:
                if pause is None:
                    raise
                self._warn(error)
                time.sleep(pause)

    def _write(self, step: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        if not self._report.complete():  # or a run that resumes from this checkpoint would lack these lines for good
            raise DiskError(f"cannot write metrics.jsonl, and so not the checkpoint of step {step}")
        rest = {name: getattr(state, name) for name in REST}
        data, meta = {"step": step}, {"config": self._config}
        self._checkpoints.save(step, state.params, rest, data, meta, metrics, ema=state.ema)

    def _notice_refusal(self, *, wait: bool) -> None:
        try:
            if wait or not self._checkpoints.is_writing():
                self._checkpoints.wait()
        except DiskError as error:
            self._owed = True
            self._warn(error)

    def _warn(self, error: DiskError) -> None:
        if jax.process_count() > 1:
            raise error
        self._owed = True
        _log.warning("%s; the run goes on and tries again, the checkpoints before are kept", error)
