"""Sharding of parameters over the mesh: what a device stores, and the collectives of a training step.

Over `fsdp`, every parameter is split along its longest axis that divides evenly; one without such an axis is replicated.
Optimizer state and moving average are sharded like their parameters. A step gathers parameters once, before the solve, and
reduces and scatters gradients once, after it, so that no loop holds a collective over `data` or `fsdp`.

Over `tensor`, a parameter is split where its Param's metadata `out_sharding` has the name of that axis, as in
`nnx.Param(kernel, out_sharding=(None, "tensor"), eager_sharding=False)`, if the size divides. The compiler places those
collectives: one of ours within a solver's loop would deadlock as soon as two devices of a group disagreed on stopping.
"""

import math
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_flax.devices.mesh import BATCH, DATA, FSDP, TENSOR, replicated
from deq_flax.errors import UserError

Specs = Any
"""A pytree of PartitionSpecs, like the parameters: nested dictionaries."""


def param_specs(params: nnx.Module | nnx.State, mesh: Mesh) -> Specs:
    """PartitionSpecs of the stored parameters, as nested dictionaries like `nnx.to_pure_dict` of the Params.

    Args:
      params: a model, of which the Params are taken, or a state of Params. Shapes suffice for arrays.

    Raises:
      UserError: the mesh has an axis `tensor`, and it splits no parameter.
    """
    state = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    specs = nnx.to_pure_dict(
        jax.tree.map(
            lambda param: _spec(param.shape, param.get_metadata("out_sharding", None) or (), mesh),
            state,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )
    )
    split = any(TENSOR in spec for spec in jax.tree.leaves(specs, is_leaf=_is_spec))
    if mesh.shape[TENSOR] > 1 and not split:
        raise UserError(
            f"mesh.tensor is {mesh.shape[TENSOR]}, but no kernel of this model can be split in so many: use mesh.fsdp instead"
        )
    return specs


def named_shardings(specs: Specs, mesh: Mesh) -> Any:
    """The specs as shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def gathered_shardings(model: nnx.Module, mesh: Mesh) -> Any:
    """Shardings of a model's parameters as evaluation wants them: gathered over `fsdp`, split over `tensor` alone."""
    return named_shardings(gathered_specs(param_specs(model, mesh)), mesh)


def bytes_on_device(tree: Any) -> int:
    """Bytes of the leaves, arrays or shapes with shardings, on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def opt_shardings(optimizer: optax.GradientTransformation, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings of the optimizer's state: each parameter's moments like the parameter, everything else replicated."""
    state = jax.eval_shape(optimizer.init, params)
    everywhere = replicated(mesh)
    return optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state, param_shardings, transform_non_params=lambda _: everywhere
    )


def manual_axes(mesh: Mesh) -> set[str]:
    """The axes that a step's `shard_map` handles itself; `tensor`, where it has several devices, is left to the compiler."""
    return set(mesh.axis_names) - ({TENSOR} if mesh.shape[TENSOR] > 1 else set())


def manual_specs(specs: Specs) -> Specs:
    """Specs for a `shard_map` over `manual_axes`: only `fsdp` of each."""
    return _only(specs, FSDP)


def gathered_specs(specs: Specs) -> Specs:
    """Specs of parameters gathered over `fsdp`, so that they are split over `tensor` alone."""
    return _only(specs, TENSOR)


def gather(params: Any, specs: Specs) -> Any:
    """Gather stored shards to parameters that are whole over `fsdp`, within a `shard_map`."""

    def one(x: jax.Array, spec: P) -> jax.Array:
        if FSDP in spec:
            x = jax.lax.all_gather(x, FSDP, axis=spec.index(FSDP), tiled=True)
            # TPU's compiler would gather in every iteration of a solver, to save the memory of what is gathered.
            x = jax.lax.optimization_barrier(x)
        return _keep_tensor(x, spec)

    return jax.tree.map(one, params, specs)


def reduce_scatter(gradient: Any, specs: Specs, mesh: Mesh) -> Any:
    """Reduce gradients of gathered parameters to the stored shards of their mean over devices, within a `shard_map`."""

    def one(x: jax.Array, spec: P) -> jax.Array:
        if FSDP not in spec:
            return jax.lax.pmean(x, batch_axes(mesh))
        x = jax.lax.psum_scatter(_keep_tensor(x, spec), FSDP, scatter_dimension=spec.index(FSDP), tiled=True)
        # Over `data` afterwards: there is only a shard left to send.
        return jax.lax.pmean(x, DATA if mesh.shape[DATA] > 1 else ()) / mesh.shape[FSDP]

    return jax.tree.map(one, gradient, specs)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes to reduce over for the whole batch: those of several devices, as XLA refuses others beside an axis `tensor`."""
    return tuple(axis for axis in BATCH if mesh.shape[axis] > 1)


def _keep_tensor(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, gathered_specs(spec)) if TENSOR in spec else x


def _spec(shape: tuple[int, ...], names: tuple[Any, ...], mesh: Mesh) -> P:
    """The PartitionSpec of an array whose Param has `names` as its `out_sharding`; names other than `tensor` do not count."""
    axes: list[str | None] = [None] * len(shape)
    parts = mesh.shape[TENSOR]
    splits = [i for i, name in enumerate(names) if name == TENSOR and parts > 1 and shape[i] % parts == 0]
    if splits:
        axes[splits[0]] = TENSOR
    parts = mesh.shape[FSDP]
    free = [i for i, size in enumerate(shape) if axes[i] is None and size and size % parts == 0]
    if parts > 1 and free:
        axes[max(free, key=lambda i: shape[i])] = FSDP
    return P(*axes)


def _only(specs: Specs, kept: str) -> Specs:
    return jax.tree.map(lambda spec: P(*(axis if axis == kept else None for axis in spec)), specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
