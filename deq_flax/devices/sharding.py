"""Which part of each parameter a device stores, and how the parts become whole for a solve and gradients parts again.

Over `fsdp`: a parameter's longest axis that divides evenly; one without such an axis is stored whole. Optimizer state and the
running average lie like their parameters. Inside a step, parameters are gathered once, before the solve, and gradients reduced
and scattered once, after it; no loop holds either.

Over `tensor`: the kernels of feed-forward and attention, in pairs, the first split by outputs and the second by inputs, so that
only the second's result has to be summed. That is left to the compiler: a collective of ours within a solver's loop would
deadlock as soon as two devices of a group disagree on stopping.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_flax.devices.mesh import BATCH, DATA, FSDP, TENSOR, replicated
from deq_flax.errors import UserError

BY_OUTPUTS = ("inner", "relative")
BY_INPUTS = ("outer", "out")
"""Names of layers whose kernels are split over `tensor`. Not of `qkv`: its outputs are queries, keys and values one after the
other, and a part of that is no set of heads."""

Specs = Any
"""A tree of PartitionSpecs, like the parameters."""


def param_specs(params: Mapping[str, Any], mesh: Mesh) -> Specs:
    """Where each parameter is stored.

    Args:
      params: nested dictionaries of arrays, or of shapes. An array's name ends in its axes: `v_IO`, `bias_O`.

    Raises:
      UserError: there is a `tensor` axis and nothing to split over it.
    """
    specs = jax.tree_util.tree_map_with_path(lambda path, x: _spec(path, x.shape, mesh), params)
    split = any(TENSOR in spec for spec in jax.tree.leaves(specs, is_leaf=_is_spec))
    if mesh.shape[TENSOR] > 1 and not split:
        raise UserError(
            f"mesh.tensor is {mesh.shape[TENSOR]}, but no kernel of this model can be split in so many: use mesh.fsdp instead"
        )
    return specs


def shardings(specs: Specs, mesh: Mesh) -> Any:
    """Specs as shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def opt_shardings(optimizer: optax.GradientTransformation, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Of the optimizer's state: what belongs to a parameter lies as it does, the rest everywhere."""
    state = jax.eval_shape(optimizer.init, params)
    everywhere = replicated(mesh)
    return optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state, param_shardings, transform_non_params=lambda _: everywhere
    )


def manual(specs: Specs) -> Specs:
    """What a `shard_map` over data and fsdp is to know of specs."""
    return jax.tree.map(lambda spec: P(*(axis if axis == FSDP else None for axis in spec)), specs, is_leaf=_is_spec)


def whole(specs: Specs) -> Specs:
    """The specs of parameters gathered over `fsdp`; they stay split over `tensor`."""
    return jax.tree.map(lambda spec: P(*(axis if axis == TENSOR else None for axis in spec)), specs, is_leaf=_is_spec)


def gather(params: Any, specs: Specs) -> Any:
    """Within a `shard_map`: stored parts -> whole parameters."""

    def one(x: jax.Array, spec: P) -> jax.Array:
        if FSDP in spec:
            x = jax.lax.all_gather(x, FSDP, axis=spec.index(FSDP), tiled=True)
        return _keep_tensor(x, spec)

    return jax.tree.map(one, params, specs)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes to sum over for the whole batch. Not those of one device: with an axis `tensor` XLA refuses a sum over none."""
    return tuple(axis for axis in BATCH if mesh.shape[axis] > 1)


def reduce_scatter(gradient: Any, specs: Specs, mesh: Mesh) -> Any:
    """Within a `shard_map`: each device's gradient of whole parameters -> the stored part of their mean over devices."""

    def one(x: jax.Array, spec: P) -> jax.Array:
        if FSDP not in spec:
            return jax.lax.pmean(x, batch_axes(mesh))
        x = jax.lax.psum_scatter(_keep_tensor(x, spec), FSDP, scatter_dimension=spec.index(FSDP), tiled=True)
        # Over `data` only now: of a part, not of the whole.
        return jax.lax.pmean(x, DATA if mesh.shape[DATA] > 1 else ()) / mesh.shape[FSDP]

    return jax.tree.map(one, gradient, specs)


def _keep_tensor(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, whole(spec)) if TENSOR in spec else x


def _spec(path: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    axes: list[str | None] = [None] * len(shape)
    split = _tensor_axis(path, shape)
    if split is not None and mesh.shape[TENSOR] > 1 and shape[split] % mesh.shape[TENSOR] == 0:
        axes[split] = TENSOR
    parts = mesh.shape[FSDP]
    free = [i for i, size in enumerate(shape) if axes[i] is None and size and size % parts == 0]
    if parts > 1 and free:
        axes[max(free, key=lambda i: shape[i])] = FSDP
    return P(*axes)


def _tensor_axis(path: tuple, shape: tuple[int, ...]) -> int | None:
    """The axis of an array that `tensor` splits: O where a layer is split by outputs, I where by inputs."""
    names = [str(entry.key) for entry in path]
    if len(names) < 2 or "_" not in names[-1]:
        return None
    layer, letters = names[-2], names[-1].rpartition("_")[2]
    if len(letters) != len(shape):
        return None
    letter = "O" if layer in BY_OUTPUTS else "I" if layer in BY_INPUTS else None
    return letters.index(letter) if letter is not None and letter in letters else None


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
