"""The checkpoints of a run, `FOLDER/<step>/`: saving, retention, and restoring the latest or the best that is intact."""

import contextlib
import dataclasses
import logging
import math
import re
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from deq_flax.checkpoints import stored_step
from deq_flax.checkpoints.stored_step import DamagedError, DiskError, Restored
from deq_flax.devices.processes import barrier, is_first
from deq_flax.errors import UserError

_log = logging.getLogger("deq_flax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Section `checkpoint` of a config: which checkpoints a run keeps, and what it starts from."""

    keep_latest: int = 2
    """Number of newest checkpoints to keep, at least 1."""
    keep_best: int = 1
    """Number of checkpoints to keep besides the newest: those of lowest validation loss."""
    init_from: str = ""
    """Workdir, checkpoints folder or checkpoint whose weights a new run starts from; empty: weights are initialized."""

    def __post_init__(self):
        if self.keep_latest < 1 or self.keep_best < 0:
            numbers = f"{self.keep_latest}, {self.keep_best}"
            raise UserError(f"checkpoint.keep_latest must be at least 1, keep_best at least 0, not {numbers}")


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      directory: the folder; created if it does not exist, unless `read_only`.
      options: the numbers of checkpoints to keep. The best have the lowest `metrics['loss']`; a checkpoint without a finite one
        is never among them.
      read_only: neither write nor rename or delete anything.

    Raises:
      UserError: the folder cannot be written to or, with `read_only`, does not exist.
    """

    def __init__(self, directory: str | Path, options: CheckpointOptions | None = None, *, read_only: bool = False):
        self._directory = Path(directory).absolute()
        self._options = options or CheckpointOptions()
        self._read_only = read_only
        self._losses: dict[int, float] = {}
        self._manager: ocp.CheckpointManager | None = None
        if not read_only:
            _require_writable(self._directory)
            barrier("checkpoints folder made")
        elif not self._directory.is_dir():
            raise UserError(f"no checkpoints at {directory}: there is no such folder")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps on disk in ascending order, intact or not."""
        self.wait()
        return stored_step.steps_in(self._directory)

    def best_step(self) -> int | None:
        """The step of lowest loss; the newest if none has a loss; None if no record can be read."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def save(
        self,
        step: int,
        *,
        params: Any,
        rest: Any,
        ema: Any = None,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Start writing a checkpoint in the background, once the previous one is on disk.

        The arrays may be donated as soon as this returns.

        Args:
          step: number of the checkpoint. A step that is on disk already is left unchanged.
          params, rest, ema: pytrees of arrays and numbers; random keys as their raw bits. `ema`: the moving average of the
            parameters, None if none is kept.
          meta: JSON, by convention with the resolved config under "config". The keys step, metrics, arrays, versions and
            checksum are added.
          metrics: numbers by name, of which `loss` decides which checkpoint is best.

        Returns:
          True if a checkpoint is being written, False if the step exists.

        Raises:
          DiskError: the disk refused this checkpoint or the previous one; older ones are kept.
        """
        if self._read_only:
            raise UserError(f"checkpoints at {self._directory} were opened read-only")
        with self._raising_disk_errors():
            manager = self._open_manager()
        if step in manager.all_steps():
            return False
        trees = {"params": params, "rest": rest} | ({} if ema is None else {"ema": ema})
        record = stored_step.make_record(step, trees, meta, metrics)
        self._losses[step] = _loss(record)
        arguments: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in stored_step.storable(trees).items()}
        with self._raising_disk_errors():
            return manager.save(step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(record)), force=True)

    def wait(self) -> None:
        """Return once the last checkpoint is on disk. DiskError if the disk refused it."""
        if self._manager is not None:
            with self._raising_disk_errors(any_failure=True):
                self._manager.wait_until_finished()

    def is_saving(self) -> bool:
        """Return True while the last checkpoint is being written, so that `wait` would block."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Wait, then release threads and files."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with self._raising_disk_errors(any_failure=True):
                manager.close()

    def restore(self, step: int, *, params: Any, rest: Any = None, ema: Any = None, variables: Any = None) -> Restored:
        """The checkpoint of one step, in the structure of the templates.

        Args:
          step: number of the checkpoint.
          params, rest, ema: templates: pytrees of arrays, `jax.ShapeDtypeStruct` or numbers. A leaf with a sharding is
            restored to it, a NumPy leaf as NumPy. None: the item is not read. Without an ema on disk the result's is None.
          variables: a template for the entry `variables` of `rest`, to read that entry alone; instead of `rest`.

        Raises:
          UserError: there is no such step, it is damaged, or names, shapes or dtypes differ from the templates.
        """
        self.wait()
        folder = self._directory / str(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"no checkpoint of step {step} in {self._directory}; there are: {known}")
        return stored_step.read_step(folder, params=params, rest=rest, ema=ema, variables=variables, step=step)

    def restore_latest(self, *, params: Any, rest: Any, ema: Any = None) -> Restored | None:
        """The newest intact checkpoint; None if there is none at all. Arguments as for `restore`.

        Each newer, damaged one is logged and, unless read-only, renamed `damaged-<step>`, so that its step can be saved again.

        Raises:
          UserError: all checkpoints are damaged, or names, shapes or dtypes differ from the templates.
        """
        restored, damaged = self._first_intact(self.steps()[::-1], params=params, rest=rest, ema=ema)
        if restored is not None and not self._read_only:
            for step in damaged:
                _rename_damaged(self._directory / str(step))
            barrier("damaged checkpoints renamed")
        return restored

    def restore_best(self, *, params: Any, variables: Any = None) -> Restored:
        """The weights of the best intact checkpoint, with their moving average if one was kept. Arguments as for `restore`.

        Raises:
          UserError: there is no intact checkpoint, or names, shapes or dtypes differ from the templates.
        """
        steps = self._ranked() or self.steps()[::-1]
        restored, _ = self._first_intact(steps, params=params, ema=params, variables=variables)
        if restored is None:
            raise UserError(f"there is no checkpoint in {self._directory}")
        return restored

    def _first_intact(self, steps: Sequence[int], **templates: Any) -> tuple[Restored | None, list[int]]:
        """The first of `steps` that passes verification, and those before it, which did not."""
        damaged = []
        for step in steps:
            try:
                return self.restore(step, **templates), damaged
            except DamagedError as reason:
                _log.warning("%s; trying the next one", reason)
                damaged.append(step)
        if damaged:
            count = f"all {len(damaged)} are damaged" if len(damaged) > 1 else "the only one is damaged"
            raise UserError(f"no whole checkpoint in {self._directory}: {count}; to start afresh, move that folder away")
        return None, damaged

    def _stored_losses(self) -> dict[int, float]:
        """The loss of every step whose record can be read."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(DamagedError):
                losses[step] = _loss(stored_step.read_record(self._directory / str(step), step=step))
        return losses

    def _ranked(self) -> list[int]:
        """The steps whose record can be read, best first."""
        losses = self._stored_losses()
        return sorted(losses, key=lambda step: (losses[step], -step))

    def _open_manager(self) -> ocp.CheckpointManager:
        """Return Orbax's manager, opened at the first save: by then `restore_latest` has renamed damaged steps."""
        if self._manager is None:
            self._losses |= self._stored_losses()
            policy = _LatestAndBest(self._losses, self._options.keep_latest, self._options.keep_best)
            options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self._manager

    @contextlib.contextmanager
    def _raising_disk_errors(self, *, any_failure: bool = False) -> Generator[None]:
        """Turn a refusal of the disk into DiskError. `any_failure`: an error of any of these types is a refusal."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None)
            refusal = re.search(r"(?:^|: )([^:]*?) ?\[os_error_code=", str(error))  # TensorStore's form of an OSError
            if not (any_failure or refusal or isinstance(error, OSError)):
                raise
            self._discard_manager()
            what = refusal[1] if refusal else reason or " ".join(str(error).split())[:160]
            raise DiskError(f"cannot write a checkpoint to {self._directory}: {what}") from error

    def _discard_manager(self) -> None:
        """Close the manager after a failure, which leaves its state unreliable; the next one deletes partial files."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()


@dataclasses.dataclass
class _LatestAndBest:
    """An Orbax preservation policy: the latest and, besides, the best.

    Orbax's own policies do not serve: `best_fn` with `max_to_keep` deletes the newest checkpoint where it is worse than the
    others, and `BestN` reads a metrics file of every step when opened, so that one damaged file would end the run.
    """

    losses: dict[int, float]
    keep_latest: int
    keep_best: int

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = [step for step in steps if math.isfinite(self.losses.get(step, math.inf))]
        best = sorted(scored, key=lambda step: (self.losses[step], -step))[: self.keep_best]
        kept = {*sorted(steps)[-self.keep_latest :], *best}
        return [step in kept for step in steps]


def _loss(record: Mapping[str, Any]) -> float:
    """The loss to rank a checkpoint by; infinite if it has none."""
    loss = (record["metrics"] or {}).get("loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _require_writable(directory: Path) -> None:
    """Raise UserError unless a file can be written and deleted: permission bits prove nothing for root or on network disks."""
    if not is_first():
        return
    probe = directory / f".probe-{time.time_ns()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write checkpoints to {directory}: {error.strerror or error}") from error


def _rename_damaged(folder: Path) -> None:
    if not is_first():
        return
    renamed = folder.with_name(f"damaged-{folder.name}")
    try:
        shutil.rmtree(renamed, ignore_errors=True)
        folder.rename(renamed)
    except OSError as error:
        raise UserError(f"cannot move the damaged checkpoint {folder} out of the way: {error.strerror or error}") from error
