"""The device mesh of a run, and arrays on it from what each process holds.

It has three axes. The batch is split over `data` and `fsdp` together, parameters are stored in shards over `fsdp`, and wide
kernels are split over `tensor` (see `devices.sharding`).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_flax.errors import UserError

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

BATCH = (DATA, FSDP)
"""The axes that a batch is split over. Devices that differ along `tensor` alone hold the same rows."""


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Section `mesh` of a config: the number of devices along each axis. One of them may be -1, for all remaining devices."""

    data: int = -1
    """Devices to split the batch over, each with a copy of the parameters; -1: all that the other axes leave."""
    fsdp: int = 1
    """Devices to split both the batch and the stored parameters over; -1: all that the other axes leave."""
    tensor: int = 1
    """Devices to split wide kernels over (tensor parallelism); -1: all that the other axes leave."""

    def __post_init__(self):
        sizes = asdict(self)
        if list(sizes.values()).count(-1) > 1 or any(size < 1 for size in sizes.values() if size != -1):
            raise UserError(
                f"mesh.data, mesh.fsdp and mesh.tensor must be at least 1, one of them -1 for the rest, not {sizes}"
            )


def make_mesh(options: MeshOptions, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor), over `devices`, by default those that JAX lists, in their order.

    Raises:
      UserError: there are too few devices for it, or their number cannot be divided so.
    """
    sizes = asdict(options)
    devices = jax.devices() if devices is None else devices
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name in (name for name, size in sizes.items() if size == -1):
        if len(devices) % fixed:
            taken = " x ".join(f"mesh.{name} {size}" for name, size in sizes.items() if size not in (-1, 1))
            raise UserError(f"{len(devices)} devices cannot be divided by {taken}: choose numbers whose product divides them")
        sizes[name] = len(devices) // fixed
    count = math.prod(sizes.values())
    if count > len(devices):
        shown = ", ".join(f"mesh.{name} is {size}" for name, size in sizes.items() if size > 1)
        raise UserError(f"{shown}: that takes {count} devices, and there are {len(devices)}; set one axis to -1 for the rest")
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(f"the mesh takes {count} of {len(devices)} devices: with several processes it must take them all")
    return Mesh(np.array(devices[:count]).reshape(tuple(sizes.values())), tuple(sizes))


def check_batch(mesh: Mesh, *, batch_size: int, accumulate: int, eval_batch_size: int) -> None:
    """Raise UserError, with sizes that work, if a batch cannot be split evenly over devices and micro-batches."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    if accumulate < 1:
        raise UserError(f"train.accumulate must be at least 1, not {accumulate}")
    for name, size, parts, product in (
        ("batch_size", batch_size, shards * accumulate, f"mesh.data x mesh.fsdp x train.accumulate = {shards} x {accumulate}"),
        ("eval_batch_size", eval_batch_size, shards, f"mesh.data x mesh.fsdp = {shards}"),
    ):
        if size % parts:
            near = max(parts, size // parts * parts)
            raise UserError(f"data.{name} {size} must be a multiple of {product}: set it to {near} or to {near + parts}")


_FUSION_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": 32768}
_OWN_CONTRACTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """XLA's options for the program of a step on the devices of a mesh; None: its defaults.

    On TPU v5e and v5p a fusion may use 32 MB of vector memory, the default on v6e, not 16. Both products of a
    feed-forward layer are one fusion, which reads the kernels once for each part of the batch that fits: for the adjoint of
    wt103:base once instead of four times, an estimated 1.41M cycles instead of 2.90M. Compiling takes twice as long.

    On a CPU, jax 0.11 and 0.12 leave convolutions to the library YNNPACK, which is slow with many channels: with jax 0.12 it
    takes seven times as long as XLA's own for 3 x 3 kernels from 256 to 1,280 channels at 4 x 4 positions, and an evaluation
    of f of cifar10:large 2.8 times. With jax 0.10 that is 1.1 to 1.3 times, and its defaults stay. Reductions are left to
    the library, which speeds up group norms. Products are not: where it has them and not the convolutions, jax 0.12
    computes NaN as the residual of `wt103:tiny` at zero.
    """
    kind = mesh.devices.flat[0].device_kind
    if kind == "cpu" and jax.__version_info__ >= (0, 11):
        return own_contractions()
    return _FUSION_MEMORY if kind in ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p") else None


@functools.cache
def own_contractions() -> dict[str, Any] | None:
    """The options for a CPU that keep XLA's own convolutions and products; None if this version of XLA does not know them."""
    number = jax.device_put(0.0, jax.local_devices(backend="cpu")[0])
    try:
        jax.jit(lambda x: x, compiler_options=_OWN_CONTRACTIONS).lower(number).compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _OWN_CONTRACTIONS


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device has whole."""
    return NamedSharding(mesh, P())


def by_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is split along its leading axis, the batch."""
    return NamedSharding(mesh, P(BATCH))


def local_rows(mesh: Mesh, batch_size: int) -> slice | None:
    """The rows of a batch that this process has to read: those on its devices. None for all, in a run of one process."""
    if jax.process_count() == 1:
        return None
    parts = [index[0] for index in by_batch(mesh).addressable_devices_indices_map((batch_size,)).values() if index]
    # Devices are ordered by process, so that the rows of a process are contiguous.
    return slice(min(part.start or 0 for part in parts), max(part.stop or batch_size for part in parts))


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """A batch, given by its `local_rows`, on the devices: leaves (batch_size, ...), split along the leading axis."""
    sharding = by_batch(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), (batch_size, *np.shape(x)[1:])), batch
    )


def place(tree: Any, shardings: Any) -> Any:
    """Arrays on the devices, from copies that every process has whole. `shardings`: a pytree of them, or one for all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)
