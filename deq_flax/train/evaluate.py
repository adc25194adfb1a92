"""Evaluation: a whole split, every example once, with a carry of its own."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from clu import metrics as clu_metrics
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from deq_flax.task import Metrics, Task
from deq_flax.train.checkpoint import load_params
from deq_flax.train.mesh import by_batch, check_batch, make_mesh, replicated
from deq_flax.train.step import EvalStep, make_eval_step, split_model


def evaluate(
    task: Task, model: nnx.Module, step: EvalStep, mesh: Mesh, params: Any, variables: Any, split: str
) -> dict[str, float]:
    """The task's summary of a split, under the given weights. Leaves everything it is given as it was."""
    batches = task.eval_batches(split)
    carry = jax.device_put(task.fresh_carry(model, task.eval_batch_size), by_batch(mesh))
    totals: Metrics | None = None
    bar = tqdm(range(len(batches)), desc=split, unit="batch", leave=False, disable=not sys.stderr.isatty())
    for i in bar:
        carry, metrics = step(params, variables, jax.device_put(batches[i], by_batch(mesh)), carry)
        totals = metrics if totals is None else merge(totals, metrics)
    return task.summary(split, divide(totals or {}))


def evaluate_checkpoint(
    task: Task, path: Path, *, mesh: Mapping[str, Any], seed: int
) -> tuple[int, dict[str, dict[str, float]]]:
    """The step of a checkpoint, and its metrics on valid and test.

    Args:
      task: its model must have the checkpoint's shapes; whatever else differs is evaluated as the task has it.
      path: a run's workdir (the best checkpoint is taken), its checkpoints folder, or the folder of one step.
      mesh: the section of the config.
      seed: of the model that the weights replace.

    Raises:
      UserError: there is no checkpoint, or it does not fit.
    """
    devices = make_mesh(**mesh)
    check_batch(devices, batch_size=task.batch_size, accumulate=1, eval_batch_size=task.eval_batch_size)
    model = task.build_model(nnx.Rngs(seed))
    graph, params, variables = split_model(model)
    restored = load_params(path, params)
    params, variables = jax.device_put((restored.weights, variables), replicated(devices))
    step = make_eval_step(task, graph, devices)
    results = {split: evaluate(task, model, step, devices, params, variables, split) for split in ("valid", "test")}
    return restored.step, results


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Sums and counts of both."""
    return {name: a[name].merge(b[name]) if name in a and name in b else (a | b)[name] for name in a | b}


def divide(metrics: Mapping[str, clu_metrics.Average]) -> dict[str, float]:
    """Sums over counts; what was never counted is left out."""
    host = jax.device_get(dict(metrics))
    return {name: float(m.total) / float(m.count) for name, m in host.items() if m.count > 0}
