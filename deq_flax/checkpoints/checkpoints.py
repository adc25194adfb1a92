"""Checkpoints of a run: `FOLDER/<step>/{params,rest,ema,data,meta}`, written by Orbax, checked by us.

Orbax restores a flipped byte without a word, takes an empty numbered folder for the latest step and stops at one damaged
metrics file. So every array carries a checksum of its own, kept with its name, shape and type in `meta`; restoring compares
all of it, and falls back to the newest checkpoint that is whole.
"""

import contextlib
import dataclasses
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from deq_flax.checkpoints import stored_step as files
from deq_flax.checkpoints.stored_step import DamagedError, DiskError, Restored
from deq_flax.devices.processes import barrier, is_first
from deq_flax.errors import UserError

__all__ = ["Checkpoints", "Restored", "borrow_params", "load_meta", "load_params"]

_log = logging.getLogger("deq_flax")


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      directory: the folder; created if it is not there, unless `read_only`.
      keep_latest: how many of the newest to keep, at least 1.
      keep_best: how many to keep besides, by lowest `metrics['loss']`. Checkpoints without that metric are never best.
      read_only: neither write nor tidy up anything.

    Raises:
      UserError: the folder cannot be written to (or, read-only, does not exist), or a number is out of range.
    """

    def __init__(self, directory: str | Path, *, keep_latest: int, keep_best: int, read_only: bool = False):
        if keep_latest < 1 or keep_best < 0:
            raise UserError(f"checkpoint.keep_latest must be at least 1, keep_best at least 0, not {keep_latest}, {keep_best}")
        self._directory = Path(directory).absolute()
        self._keep = keep_latest, keep_best
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
        """The steps on disk, in order, whole or not."""
        self.wait()
        return files.steps_in(self._directory)

    def best_step(self) -> int | None:
        """The step of the lowest loss; the newest if none has a loss; None if no checkpoint can be read."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def save(
        self,
        step: int,
        params: Any,
        rest: Any,
        data: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        ema: Any = None,
    ) -> bool:
        """Start writing a checkpoint, after the one before it is on disk. The arrays may be donated as soon as this returns.

        Args:
          step: its number. A step that is on disk already is left as it is.
          params, rest, ema: pytrees of arrays and numbers; random keys as their raw bits. `ema=None`: there is none.
          data: JSON, the position in the data.
          meta: JSON, by convention with the resolved config under "config". The keys step, metrics, arrays, versions and
            checksum are added.
          metrics: of these, `loss` decides which checkpoint is best.

        Returns:
          Whether a checkpoint is being written: False if that step exists.

        Raises:
          DiskError: the disk refuses this checkpoint or the one before; the ones before that are kept.
        """
        if self._read_only:
            raise UserError(f"checkpoints at {self._directory} were opened read-only")
        with self._disk_errors_are_the_users():
            manager = self._open_manager()
        if step in manager.all_steps():
            return False
        trees = {"params": params, "rest": rest} | ({} if ema is None else {"ema": ema})
        record = files.make_record(step, trees, data, meta, metrics)
        self._losses[step] = _loss(record)
        arguments: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in files.storable(trees).items()}
        arguments |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(record)}
        with self._disk_errors_are_the_users():
            return manager.save(step, args=ocp.args.Composite(**arguments), force=True)

    def wait(self) -> None:
        """Return when the last checkpoint is on disk. DiskError if the disk refused it."""
        if self._manager is not None:
            with self._disk_errors_are_the_users(all_of_them=True):
                self._manager.wait_until_finished()

    def is_writing(self) -> bool:
        """Whether the last checkpoint is still on its way, so that `wait` would wait."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Wait, then let go of threads and files."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            with self._disk_errors_are_the_users(all_of_them=True):
                manager.close()

    def restore(
        self,
        step: int,
        template_params: Any,
        template_rest: Any = None,
        template_ema: Any = None,
        template_variables: Any = None,
    ) -> Restored:
        """The checkpoint of one step, in the structure of the templates.

        Args:
          step: its number.
          template_params, template_rest, template_ema: pytrees of arrays, `jax.ShapeDtypeStruct` or numbers. A leaf with a
            sharding comes back with it; a NumPy leaf comes back as NumPy. None: that part is not read. A checkpoint without
            an ema gives None for it.
          template_variables: likewise, instead of `template_rest`: of the rest, what it holds under 'variables'.

        Raises:
          UserError: no such step, damaged, or its arrays differ in name, shape or type from the templates.
        """
        self.wait()
        folder = self._directory / str(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"no checkpoint of step {step} in {self._directory}; there are: {known}")
        templates = dict(rest=template_rest, ema=template_ema, variables=template_variables)
        return files.read_step(folder, params=template_params, **templates)

    def restore_latest(self, template_params: Any, template_rest: Any, template_ema: Any = None) -> Restored | None:
        """The newest whole checkpoint; None if there is none at all. Arguments as for `restore`.

        Each damaged newer one gets a warning and, unless read-only, is renamed `damaged-<step>` so that its number is free.

        Raises:
          UserError: there are checkpoints but none is whole, or the arrays differ from the templates.
        """
        steps = self.steps()[::-1]
        restored, damaged = self._first_whole(steps, (template_params, template_rest, template_ema))
        if restored is not None and not self._read_only:
            for step in damaged:
                _set_aside(self._directory / str(step))
            barrier("damaged checkpoints set aside")
        return restored

    def restore_best(self, template_params: Any, template_variables: Any = None, template_ema: Any = None) -> Restored:
        """The weights of the best whole checkpoint. Arguments as for `restore`; `template_ema=None`: as the parameters.

        Raises:
          UserError: there is no whole checkpoint, or the arrays differ from the template.
        """
        template_ema = template_params if template_ema is None else template_ema
        templates = (template_params, None, template_ema, template_variables)
        restored, _ = self._first_whole(self._ranked() or self.steps()[::-1], templates)
        if restored is None:
            raise UserError(f"there is no checkpoint in {self._directory}")
        return restored

    def _first_whole(self, steps: list[int], templates: tuple) -> tuple[Restored | None, list[int]]:
        damaged = []
        for step in steps:
            try:
                return self.restore(step, *templates), damaged
            except DamagedError as reason:
                _log.warning("%s; trying the next one", reason)
                damaged.append(step)
        if damaged:
            count = f"all {len(damaged)} are damaged" if len(damaged) > 1 else "the only one is damaged"
            raise UserError(f"no whole checkpoint in {self._directory}: {count}; to start afresh, move that folder away")
        return None, damaged

    def _ranked(self) -> list[int]:
        """Steps whose record can be read, the best first."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(DamagedError):
                losses[step] = _loss(files.read_record(self._directory / str(step))[0])
        return sorted(losses, key=lambda step: (losses[step], -step))

    def _open_manager(self) -> ocp.CheckpointManager:
        """Opened at the first save: by then damaged steps are out of its sight."""
        if self._manager is None:
            for step in self.steps():
                with contextlib.suppress(DamagedError):
                    self._losses[step] = _loss(files.read_record(self._directory / str(step))[0])
            policy = _LatestAndBest(self._losses, *self._keep)
            options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        return self._manager

    @contextlib.contextmanager
    def _disk_errors_are_the_users(self, *, all_of_them: bool = False):
        """Turns what the disk did into a DiskError; `all_of_them`: any failure, as of writing in the background."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None)
            refusal = re.search(r"(?:^|: )([^:]*?) ?\[os_error_code=", str(error))  # TensorStore's way of an OSError
            if not (all_of_them or refusal or isinstance(error, OSError)):
                raise
            self._give_up_manager()
            what = refusal[1] if refusal else reason or " ".join(str(error).split())[:160]
            raise DiskError(f"cannot write a checkpoint to {self._directory}: {what}") from error

    def _give_up_manager(self) -> None:
        """After a failure Orbax's own records are not to be trusted: the next save opens it anew, which tidies the disk up."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):
                manager.close()


def load_params(path: str | Path, template_params: Any, template_variables: Any = None) -> Restored:
    """Weights to start from or to evaluate; `.weights` of the result is their running average if one was kept.

    `.variables` is what else the model needs, such as running statistics of batch normalisation.

    Args:
      path: a run's workdir or its checkpoints folder (the best checkpoint is taken), or the folder of one step.
      template_params, template_variables: as for `Checkpoints.restore`.

    Raises:
      UserError: there is nothing there, it is damaged, or it does not fit the template.
    """
    folder = _find(path)
    if files.is_step(folder):
        return files.read_step(folder, params=template_params, ema=template_params, variables=template_variables)
    return Checkpoints(folder, keep_latest=1, keep_best=0, read_only=True).restore_best(template_params, template_variables)


def load_meta(path: str | Path) -> dict[str, Any]:
    """The `meta` (config, step, metrics) of what `load_params` would load. Arguments and errors as there."""
    return files.read_record(_one_step(path))[0]


def borrow_params(path: str | Path, params: Any, variables: Any, head: str) -> files.Borrowed:
    """Weights for a model that may differ from the checkpoint's below `head`: see `checkpoint_step.borrow`. `path` as above."""
    return files.borrow(_one_step(path), params=params, variables=variables, head=head)


def _one_step(path: str | Path) -> Path:
    """The folder of the step that `path` means: of the best one, if it means several."""
    folder = _find(path)
    if files.is_step(folder):
        return folder
    step = Checkpoints(folder, keep_latest=1, keep_best=0, read_only=True).best_step()
    if step is None:
        raise UserError(f"no whole checkpoint in {folder}")
    return folder / str(step)


def _find(path: str | Path) -> Path:
    """The checkpoints folder, or the folder of one step, that `path` means."""
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not files.is_step(folder) and not files.steps_in(folder):
        raise UserError(f"no checkpoint at {path}: it is neither a workdir, nor its checkpoints folder, nor one step of it")
    return folder


@dataclasses.dataclass
class _LatestAndBest:
    """Orbax preservation policy. Its own BestN reads a metrics file a step at opening, and one damaged file stops it."""

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
    """The loss to rank by; infinite if there is none."""
    loss = (record["metrics"] or {}).get("loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _require_writable(directory: Path) -> None:
    """Writes and removes a file: permission bits do not tell the truth to root, nor on network disks."""
    if not is_first():
        return
    probe = directory / f".probe-{time.time_ns()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write checkpoints to {directory}: {error.strerror or error}") from error


def _set_aside(folder: Path) -> None:
    if not is_first():
        return
    aside = folder.with_name(f"damaged-{folder.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    except OSError as error:
        raise UserError(f"cannot move the damaged checkpoint {folder} out of the way: {error.strerror or error}") from error
