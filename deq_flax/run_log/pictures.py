"""Pictures of a model's output on a few fixed examples, for tasks that implement `HasPictures`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from deq_flax.devices.mesh import replicated
from deq_flax.equilibrium.solution import Solve
from deq_flax.task import Batch, HasPictures, Task

Draw = Callable[[Any, Any], dict[str, np.ndarray]]
"""(params, variables) -> pictures, (H, W, 3) uint8, by name."""


def make_pictures(task: Task, graphdef: nnx.GraphDef, mesh: Mesh, solve: Solve | None) -> Draw:
    """A function that draws the pictures of a task under given weights; no pictures where the task has none.

    `solve`: the argument `solve` of `Task.loss` in evaluation.
    """
    batch = task.picture_batch() if isinstance(task, HasPictures) else None
    if batch is None or not isinstance(task, HasPictures):
        return lambda params, variables: {}
    drawing = task

    @partial(jax.jit, out_shardings=replicated(mesh))  # so that each process can read all of it
    def arrays(params: Any, variables: Any, batch: Batch) -> Any:
        return drawing.picture_arrays(nnx.merge(graphdef, params, variables, copy=True), batch, solve=solve)

    def draw(params: Any, variables: Any) -> dict[str, np.ndarray]:
        return drawing.pictures(batch, jax.device_get(arrays(params, variables, batch)))

    return draw
