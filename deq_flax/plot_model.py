"""Plots of an image model at its best checkpoint: predictions, confusion matrix, residuals by branch.

B batch, J branches, K classes, S steps.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_flax.devices.mesh import MeshOptions, make_mesh
from deq_flax.equilibrium import Solver, fixed_point
from deq_flax.run_log.pictures import make_pictures
from deq_flax.task import HasEquation
from deq_flax.train.evaluate import load, measure
from deq_flax.train.phases import DEQOptions, make_phases
from deq_flax.train.step import make_eval_step

SHOWN_CLASSES = 40
"""Most classes of a confusion matrix for which names and numbers are written."""


def draw_model(pyplot: Any, task: Any, deq: DEQOptions | None, workdir: Path) -> dict[str, Any]:
    """Matplotlib figures, or images, (H, W, 3) uint8, by name.

    Args:
      pyplot: Matplotlib's pyplot module.
      task: an image task.
      deq: section `deq` of the run's config; None: the model has no equilibrium.
      workdir: workdir of the run, whose best checkpoint is used.
    """
    devices = make_mesh(MeshOptions(data=1, fsdp=1, tensor=1))
    model, graphdef, weights, _ = load(task, workdir, devices)
    phase = make_phases(deq, seed=0).evaluation
    drawn: dict[str, Any] = dict(make_pictures(task, graphdef, devices, phase.solve())(*weights))
    metrics = measure(task, model, make_eval_step(task, graphdef, devices, phase), devices, *weights, "valid")
    if "confusion" in metrics:
        drawn["confusion"] = draw_confusion(pyplot, metrics["confusion"], task.class_names)
    batch, solver = task.picture_batch(), phase.solver
    if batch is not None and solver is not None and isinstance(task, HasEquation):

        @jax.jit
        def residuals(params: Any, variables: Any, batch: Any) -> jax.Array:
            model = nnx.merge(graphdef, params, variables, copy=True)
            carry = task.fresh_carry(model, len(jax.tree.leaves(batch)[0]))
            return branch_residuals(*task.equation(model, batch, carry), solver)

        drawn["branch_residuals"] = draw_residuals(pyplot, np.asarray(residuals(*weights, batch)))
    return drawn


def branch_residuals(f: Callable[[Any], Any], z0: Any, solver: Solver) -> jax.Array:
    """(S, J): the largest ||f(z) - z|| / ||f(z)|| of branch j in the batch, at the best z within s evaluations of f.

    Args:
      f: the map whose fixed point is solved for.
      z0: the initial guess; its leaves, (B, ...), are the branches.
      solver: the solver, whose limit on evaluations is S.
    """

    def at(limit: jax.Array) -> jax.Array:
        z = fixed_point(f, z0, solver=solver, max_steps=limit).value
        pairs = zip(jax.tree.leaves(f(z)), jax.tree.leaves(z), strict=True)
        return jnp.stack([jnp.max(_norm(a - b) / jnp.maximum(_norm(a), 1e-12)) for a, b in pairs])

    return jax.lax.map(at, jnp.arange(1, solver.max_steps + 1))


def draw_confusion(pyplot: Any, confusion_KK: np.ndarray, class_names: Sequence[str]) -> Any:
    """A figure of a confusion matrix, (true class, predicted class), each row divided by its sum."""
    share_KK = confusion_KK / np.maximum(confusion_KK.sum(axis=1, keepdims=True), 1e-9)
    count = len(class_names)
    side = min(4 + 0.32 * count, 14)
    figure, axis = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    image = axis.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    if count <= SHOWN_CLASSES:
        axis.set_xticks(range(count), class_names, rotation=90)
        axis.set_yticks(range(count), class_names)
        for i, j in np.argwhere(share_KK >= 0.005):
            color = "white" if share_KK[i, j] > 0.5 else "black"
            axis.text(j, i, f"{100 * share_KK[i, j]:.0f}", ha="center", va="center", fontsize=7, color=color)
    axis.set(xlabel="predicted", ylabel="true", title="confusion on valid, percent of the true class")
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def draw_residuals(pyplot: Any, residual_SJ: np.ndarray) -> Any:
    """A figure with the residual of each branch against the evaluations of f."""
    figure, axis = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for j, residual_S in enumerate(residual_SJ.T):
        axis.semilogy(range(1, len(residual_S) + 1), residual_S, marker="o", ms=3, label=f"branch {j}")
    axis.set(
        title="residual of each branch, largest of the shown images", xlabel="evaluations of f", ylabel="relative residual"
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def _norm(x: jax.Array) -> jax.Array:
    """(B,) norms of the samples."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))
