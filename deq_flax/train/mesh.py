"""The devices of a run as a mesh, and where arrays lie on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_flax.errors import UserError

DATA = "data"
"""The axis that the batch is split over."""


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of all devices along `data`.

    Args:
      data: how many devices share a batch; -1 is all of them.
      fsdp, tensor: devices that share the parameters; only 1 so far.

    Raises:
      UserError: there are fewer devices, or an axis that is not there yet is asked for.
    """
    if fsdp != 1 or tensor != 1:
        raise UserError(
            f"mesh.fsdp and mesh.tensor must be 1, not {fsdp} and {tensor}: parameters are not sharded yet, use mesh.data"
        )
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise UserError(f"mesh.data is {data}, but there are {len(devices)} devices: set it to -1 to use them all")
    return Mesh(np.array(devices[:count]), (DATA,))


def check_batch(mesh: Mesh, *, batch_size: int, accumulate: int, eval_batch_size: int) -> None:
    """Raise UserError, with the cure, when a batch cannot be split evenly over devices and micro-batches."""
    devices = mesh.shape[DATA]
    if accumulate < 1:
        raise UserError(f"train.accumulate must be at least 1, not {accumulate}")
    if batch_size % (devices * accumulate):
        raise UserError(
            f"data.batch_size {batch_size} must be a multiple of mesh.data x train.accumulate = {devices} x {accumulate}"
        )
    if eval_batch_size % devices:
        raise UserError(f"data.eval_batch_size {eval_batch_size} must be a multiple of mesh.data = {devices}")


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def by_batch(mesh: Mesh) -> NamedSharding:
    """Split along the leading axis."""
    return NamedSharding(mesh, P(DATA))
