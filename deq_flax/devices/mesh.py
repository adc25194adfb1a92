"""The devices of a run as a mesh, and how what each process holds becomes arrays on it.

Three axes: the batch is split over `data` and `fsdp` together, parameters are stored in parts over `fsdp`, and wide kernels
are split over `tensor` (see `train.sharding`).
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_flax.errors import UserError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

BATCH = (DATA, FSDP)
"""The axes that a batch is split over: every device of one `tensor` group has the same part, other groups others."""


def make_mesh(*, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh (data, fsdp, tensor), in the order that JAX lists the devices.

    Args:
      data, fsdp, tensor: devices along each axis; one of them may be -1, which is all that the others leave.

    Raises:
      UserError: the devices do not make up such a mesh.
    """
    sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
    devices = jax.devices()
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise UserError(f"mesh.data, mesh.fsdp and mesh.tensor must be at least 1, one of them -1 for the rest, not {sizes}")
    if free and len(devices) % fixed:
        taken = " x ".join(f"mesh.{name} {size}" for name, size in sizes.items() if size not in (-1, 1))
        raise UserError(f"{len(devices)} devices cannot be divided by {taken}: choose numbers whose product divides them")
    if free:
        sizes[free[0]] = len(devices) // fixed
    count = math.prod(sizes.values())
    if count > len(devices):
        shown = ", ".join(f"mesh.{name} is {size}" for name, size in sizes.items() if size > 1)
        raise UserError(f"{shown}: that takes {count} devices, and there are {len(devices)}; set one axis to -1 for the rest")
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(f"the mesh takes {count} of {len(devices)} devices: with several processes it must take them all")
    return Mesh(np.array(devices[:count]).reshape(tuple(sizes.values())), tuple(sizes))


def check_batch(mesh: Mesh, *, batch_size: int, accumulate: int, eval_batch_size: int) -> None:
    """Raise UserError, with the cure, when a batch cannot be split evenly over devices and micro-batches."""
    shards = _shards(mesh)
    if accumulate < 1:
        raise UserError(f"train.accumulate must be at least 1, not {accumulate}")
    for name, size, parts, product in (
        ("batch_size", batch_size, shards * accumulate, f"mesh.data x mesh.fsdp x train.accumulate = {shards} x {accumulate}"),
        ("eval_batch_size", eval_batch_size, shards, f"mesh.data x mesh.fsdp = {shards}"),
    ):
        if size % parts:
            near = max(parts, size // parts * parts)
            raise UserError(f"data.{name} {size} must be a multiple of {product}: set it to {near} or to {near + parts}")


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def by_batch(mesh: Mesh) -> NamedSharding:
    """Split along the leading axis."""
    return NamedSharding(mesh, P(BATCH))


def own_rows(mesh: Mesh, batch_size: int) -> slice | None:
    """The rows of a batch that this process's devices hold, and so has to read; None when it is alone and reads them all."""
    if jax.process_count() == 1:
        return None
    parts = [index[0] for index in by_batch(mesh).addressable_devices_indices_map((batch_size,)).values() if index]
    # Devices are in the order of their processes, so that these parts adjoin.
    return slice(min(part.start or 0 for part in parts), max(part.stop or batch_size for part in parts))


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """A batch, or of it `own_rows`, on the devices: leaves (batch_size, ...) split along the leading axis."""
    sharding = by_batch(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), (batch_size, *np.shape(x)[1:])), batch
    )


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, on the devices. `shardings`: a tree of them, or one for all leaves."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def _shards(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH)
