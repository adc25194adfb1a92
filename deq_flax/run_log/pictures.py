"""Pictures of what a model makes of some examples, for tasks that have such."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from deq_flax.devices.mesh import replicated
from deq_flax.task import Batch, HasPictures, Task

Draw = Callable[[Any, Any], dict[str, np.ndarray]]
"""(params, variables) -> (H, W, 3) uint8 by name."""


def make_pictures(task: Task, graph: Any, mesh: Mesh) -> Draw:
    """A function that draws, always of the same examples; one that draws nothing where the task does not."""
    batch = task.picture_batch() if isinstance(task, HasPictures) else None
    if batch is None or not isinstance(task, HasPictures):
        return lambda params, variables: {}
    shown = task

    @partial(jax.jit, out_shardings=replicated(mesh))  # each process can then read all of it
    def arrays(params: Any, variables: Any, batch: Batch) -> Any:
        return shown.picture_arrays(nnx.merge(graph, params, variables, copy=True), batch)

    def draw(params: Any, variables: Any) -> dict[str, np.ndarray]:
        return shown.pictures(batch, jax.device_get(arrays(params, variables, batch)))

    return draw
