"""Evaluation: a whole split, every example once, with a carry of its own."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import metrics as clu_metrics
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from deq_flax.checkpoints.checkpoints import load_params
from deq_flax.devices.mesh import FSDP, by_batch, check_batch, make_mesh, own_rows, place, put_batch, replicated
from deq_flax.devices.processes import is_first
from deq_flax.devices.sharding import param_specs, shardings, whole
from deq_flax.errors import UserError
from deq_flax.task import Controls, HasSpectralRadius, Metrics, Task
from deq_flax.train.step import EvalStep, make_eval_step, split_model

SPLITS = ("valid", "test")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What there is to say of a checkpoint."""

    step: int
    metrics: dict[str, dict[str, float]]
    """By split."""
    anytime: list[dict[str, Any]]
    """Metrics by split and limit on the evaluations, one row each with these as `split` and `max_steps`."""


class Loaded(NamedTuple):
    """A checkpoint on a mesh."""

    model: nnx.Module
    """Of its arrays, only the shapes are the checkpoint's."""
    graph: Any
    weights: tuple[Any, Any]
    """Parameters and variables, whole on every device but for what `tensor` splits."""
    step: int


def load(task: Task, path: Path, mesh: Mesh, *, seed: int = 0) -> Loaded:
    """The checkpoint that `path` means; arguments and errors as of `evaluate_checkpoint`."""
    model = task.build_model(nnx.Rngs(seed))
    graph, params, variables = split_model(model)
    restored = load_params(path, params, variables)
    params = place(restored.weights, shardings(whole(param_specs(params, mesh)), mesh))
    return Loaded(model, graph, (params, place(restored.variables, replicated(mesh))), restored.step)


def evaluate(
    task: Task,
    model: nnx.Module,
    step: EvalStep,
    mesh: Mesh,
    params: Any,
    variables: Any,
    split: str,
    *,
    max_steps: int | None = None,
) -> dict[str, float]:
    """The task's summary of what `measure` gives, with the same arguments."""
    return task.summary(split, measure(task, model, step, mesh, params, variables, split, max_steps=max_steps))


def measure(
    task: Task,
    model: nnx.Module,
    step: EvalStep,
    mesh: Mesh,
    params: Any,
    variables: Any,
    split: str,
    *,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """The task's metrics over a whole split, under the given weights. Leaves everything it is given as it was.

    `max_steps`: a tighter limit on the evaluations of a solve than the task's own; traced, so that it never recompiles.
    """
    controls = None if max_steps is None else Controls(max_steps=np.int32(max_steps), jacobian_weight=np.float32(0))
    batches = task.eval_batches(split, own_rows(mesh, task.eval_batch_size))
    params = _gathered(params, mesh)
    carry = place(task.fresh_carry(model, task.eval_batch_size), by_batch(mesh))
    totals: Metrics = {}
    pending: Metrics = {}
    bar = tqdm(range(len(batches)), desc=split, unit="batch", leave=False, disable=not (is_first() and sys.stderr.isatty()))
    for i in bar:
        carry, metrics = step(params, variables, put_batch(mesh, batches[i], task.eval_batch_size), carry, controls)
        totals, pending = merge(totals, fetch(pending)), metrics
    return divide(merge(totals, fetch(pending)))


def evaluate_checkpoint(
    task: Task,
    path: Path,
    *,
    mesh: Mapping[str, Any],
    seed: int,
    spectral_radius: bool = False,
    max_steps_sweep: Sequence[int] = (),
) -> Evaluation:
    """A checkpoint on valid and test.

    Args:
      task: its model must have the checkpoint's shapes; whatever else differs is evaluated as the task has it.
      path: a run's workdir (the best checkpoint is taken), its checkpoints folder, or the folder of one step.
      mesh: the section of the config.
      seed: of the model that the weights replace.
      spectral_radius: add mean and maximum, over the first batch, of the spectral radius at the equilibria.
      max_steps_sweep: limits on the evaluations of a solve to evaluate with besides, none above the task's own.

    Raises:
      UserError: there is no checkpoint, it does not fit, or the task has no spectral radius.
    """
    devices = make_mesh(**mesh)
    check_batch(devices, batch_size=task.batch_size, accumulate=1, eval_batch_size=task.eval_batch_size)
    model, graph, weights, number = load(task, path, devices, seed=seed)
    step = make_eval_step(task, graph, devices)
    results = {split: evaluate(task, model, step, devices, *weights, split) for split in SPLITS}
    if spectral_radius:
        results["valid"] |= _spectral_radius(task, model, graph, devices, *weights)
    anytime = [
        {"split": split, "max_steps": limit} | evaluate(task, model, step, devices, *weights, split, max_steps=limit)
        for limit in max_steps_sweep
        for split in SPLITS
    ]
    return Evaluation(step=number, metrics=results, anytime=anytime)


def _spectral_radius(task: Task, model: nnx.Module, graph: Any, mesh: Mesh, params: Any, variables: Any) -> dict[str, float]:
    """Of the first batch of the validation split."""
    if not isinstance(task, HasSpectralRadius):
        raise UserError("eval.spectral_radius: this task has none; set it to False")

    @partial(jax.jit, out_shardings=replicated(mesh))
    def radii(params: Any, variables: Any, batch: Any, carry: Any) -> jax.Array:
        return task.spectral_radius(nnx.merge(graph, params, variables, copy=True), batch, carry, jax.random.key(0))

    batches = task.eval_batches("valid", own_rows(mesh, task.eval_batch_size))
    batch = put_batch(mesh, batches[0], task.eval_batch_size)
    carry = place(task.fresh_carry(model, task.eval_batch_size), by_batch(mesh))
    radii_B = np.asarray(radii(params, variables, batch, carry))
    return {"spectral_radius_mean": float(radii_B.mean()), "spectral_radius_max": float(radii_B.max())}


def _gathered(params: Any, mesh: Mesh) -> Any:
    """Parameters whole on every device, but for what `tensor` splits: once, not for every batch."""
    if mesh.shape[FSDP] == 1:
        return params
    return jax.device_put(params, shardings(whole(param_specs(params, mesh)), mesh))


def fetch(metrics: Metrics) -> Metrics:
    """On the host, where they are summed in float64: in float32, a count of pixels would stop at 2^24.

    To be called one batch behind the last that was dispatched. A host that never waits fills the device's queue, and several
    processes on CPUs do not get out of full ones: each waits for room, with a program not started that another waits for.
    """
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(metrics))


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Sums and counts of both."""
    return {name: a[name].merge(b[name]) if name in a and name in b else (a | b)[name] for name in a | b}


def divide(metrics: Mapping[str, clu_metrics.Average]) -> dict[str, Any]:
    """Sums over counts; what was never counted is left out. A metric that is an array, a table of counts, stays one."""
    means = {name: np.asarray(m.total) / float(m.count) for name, m in metrics.items() if m.count > 0}
    return {name: float(mean) if mean.ndim == 0 else mean for name, mean in means.items()}
