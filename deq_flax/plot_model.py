"""Pictures of an image model at its best checkpoint: predictions, confusion matrix, residuals of each branch.

B batch, K classes, S steps.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_flax.devices.mesh import make_mesh
from deq_flax.equilibrium import fixed_point
from deq_flax.run_log.pictures import make_pictures
from deq_flax.train.evaluate import load, measure
from deq_flax.train.step import make_eval_step

SHOWN_CLASSES = 40
"""Of a confusion matrix with more, neither names nor numbers are written."""


def draw_model(pyplot: Any, task: Any, workdir: Path) -> dict[str, Any]:
    """Figures, or (H, W, 3) uint8, by name.

    Args:
      pyplot: Matplotlib's.
      task: of an image model, see `tasks.images.ImageTask`.
      workdir: of its run; the best checkpoint is taken.
    """
    devices = make_mesh(data=1, fsdp=1, tensor=1)
    model, graph, weights, _ = load(task, workdir, devices)
    drawn: dict[str, Any] = dict(make_pictures(task, graph, devices)(*weights))
    metrics = measure(task, model, make_eval_step(task, graph, devices), devices, *weights, "valid")
    if "confusion" in metrics:
        drawn["confusion"] = draw_confusion(pyplot, metrics["confusion"], task.class_names)
    batch = task.picture_batch()
    if batch is not None:
        residual_SJ = np.asarray(jax.jit(lambda p, v, x: branch_residuals(task, nnx.merge(graph, p, v, copy=True), x))(
            *weights, batch["images"]
        ))  # fmt: skip
        drawn["branch_residuals"] = draw_residuals(pyplot, residual_SJ)
    return drawn


def branch_residuals(task: Any, model: Any, images: jax.Array) -> jax.Array:
    """(S, J): ||f(z) - z|| / ||f(z)|| of branch j, of the member that is worst off, for the best z within s evaluations."""
    f, z0 = model.equation(task.normalise(images))
    solver = task.recipe.forward_solver

    def at(limit: jax.Array) -> jax.Array:
        z = fixed_point(f, z0, solver=solver, max_steps=limit).value
        return jnp.stack([jnp.max(_norm(a - b) / jnp.maximum(_norm(a), 1e-12)) for a, b in zip(f(z), z, strict=True)])

    return jax.lax.map(at, jnp.arange(1, solver.max_steps + 1))


def draw_confusion(pyplot: Any, confusion_KK: np.ndarray, class_names: tuple[str, ...]) -> Any:
    """Rows are the truth, each of sum 1."""
    share_KK = confusion_KK / np.maximum(confusion_KK.sum(axis=1, keepdims=True), 1e-9)
    count = len(class_names)
    side = min(4 + 0.32 * count, 14)
    figure, axis = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    image = axis.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    if count <= SHOWN_CLASSES:
        axis.set_xticks(range(count), class_names, rotation=90)
        axis.set_yticks(range(count), class_names)
        for i, j in np.argwhere(share_KK >= 0.005):
            colour = "white" if share_KK[i, j] > 0.5 else "black"
            axis.text(j, i, f"{100 * share_KK[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set(xlabel="predicted", ylabel="true", title="confusion on valid, percent of the true class")
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def draw_residuals(pyplot: Any, residual_SJ: np.ndarray) -> Any:
    """A line for each branch."""
    figure, axis = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for j, residual_S in enumerate(residual_SJ.T):
        axis.semilogy(range(1, len(residual_S) + 1), residual_S, marker="o", ms=3, label=f"branch {j}")
    axis.set(title="residual of each branch, worst of the shown images", xlabel="evaluations of f", ylabel="relative residual")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def _norm(x: jax.Array) -> jax.Array:
    """(B,) of each member."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))))
