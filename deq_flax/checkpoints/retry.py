"""Saving during a run: a disk that refuses for a while costs a checkpoint, not the run."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from deq_flax.checkpoints.checkpoints import Checkpoints
from deq_flax.checkpoints.stored_step import DiskError

FINAL_PAUSES = (1, 2, 4, 8)
"""Seconds between the attempts at a process's final save: together less than the grace period before it is killed."""

_log = logging.getLogger("deq_flax")


class RetryingSaver:
    """Saves checkpoints of a run, and logs and remembers failed saves, so that they can be made up for.

    With several processes a failed save ends the run: they cannot know whose part of it failed.

    Args:
      checkpoints: the checkpoints of the run, to which the saves are added.
      meta: JSON that every checkpoint stores, see `Checkpoints.save`.
      may_save: called before each save; returns True if all lines of the run log are on disk. Otherwise the save counts as
        refused: a run resumed from that checkpoint would never write the missing lines.
    """

    def __init__(self, checkpoints: Checkpoints, meta: Mapping[str, Any], *, may_save: Callable[[], bool] = lambda: True):
        self._checkpoints, self._meta, self._may_save = checkpoints, meta, may_save
        self._failed = False

    def save(self, step: int, trees: Mapping[str, Any], metrics: Mapping[str, float] | None, **meta: Any) -> None:
        """Start a save. A failure, also of the previous save, is logged and remembered.

        Args:
          step, metrics: as for `Checkpoints.save`.
          trees: the arguments `params`, `rest` and, unless None, `ema` of `Checkpoints.save`, by these names.
          meta: JSON that this checkpoint stores beside that of every checkpoint.
        """
        self._check_previous(wait=True)
        try:
            self._start(step, trees, metrics, meta)
            self._failed = False
        except DiskError as error:
            self._remember(error)

    def needs_retry(self) -> bool:
        """Return True if the last save failed, perhaps in the background since, so that one should be made soon."""
        if jax.process_count() == 1:
            self._check_previous(wait=False)
        return self._failed

    def save_final(self, step: int, trees: Mapping[str, Any], metrics: Mapping[str, float] | None, **meta: Any) -> None:
        """Save, and return once it is on disk; DiskError if it fails repeatedly. Arguments as for `save`."""
        self._check_previous(wait=True)
        for pause in (*FINAL_PAUSES, None):
            try:
                self._start(step, trees, metrics, meta)
                return self._checkpoints.wait()
            except DiskError as error:
                if pause is None:
                    raise
                self._remember(error)
                time.sleep(pause)

    def _start(self, step: int, trees: Mapping[str, Any], metrics: Mapping[str, float] | None, meta: Mapping[str, Any]) -> None:
        if not self._may_save():
            raise DiskError(f"cannot write the run's log, and so not the checkpoint of step {step}")
        self._checkpoints.save(step, **trees, meta={**self._meta, **meta}, metrics=metrics)

    def _check_previous(self, *, wait: bool) -> None:
        """Notice a failure of the previous save; unless `wait`, only if it is no longer being written."""
        try:
            if wait or not self._checkpoints.is_saving():
                self._checkpoints.wait()
        except DiskError as error:
            self._remember(error)

    def _remember(self, error: DiskError) -> None:
        if jax.process_count() > 1:
            raise error
        self._failed = True
        _log.warning("%s; training continues and tries again, the checkpoints before are kept", error)
