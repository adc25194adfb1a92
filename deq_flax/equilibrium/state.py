"""Conversion between a user's state, a pytree with a leading batch axis, and the flat (B, N) array that solvers work on."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

FlatMap = Callable[[jax.Array], jax.Array]
"""f: (B, N) -> (B, N), a map of flat states. A row is a sample; rows do not depend on each other."""


def flattener(z: Any) -> tuple[Callable[[Any], jax.Array], Callable[[jax.Array], Any]]:
    """Return `flatten` and `unflatten` for pytrees like z.

    The flat array is float32, or float64 if a leaf of z is. A bfloat16 state is iterated in float32, because solver history
    in bfloat16 stalls Anderson acceleration at residuals of 1e-2. `unflatten` restores the dtype of each leaf; the round trip
    is exact.

    Raises:
      ValueError: a leaf has no batch axis, another batch size than the first leaf, or no real floating dtype.
    """
    leaves, structure = jax.tree.flatten(z)
    check_state(z)
    shapes = [leaf.shape for leaf in leaves]
    dtypes = [leaf.dtype for leaf in leaves]
    sizes = [math.prod(shape[1:]) for shape in shapes]
    dtype = jnp.result_type(jnp.float32, *dtypes)

    def flatten(tree: Any) -> jax.Array:
        parts = [jnp.reshape(leaf, (leaf.shape[0], -1)).astype(dtype) for leaf in jax.tree.leaves(tree)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def unflatten(flat: jax.Array) -> Any:
        pieces, start = [], 0
        for shape, leaf_dtype, size in zip(shapes, dtypes, sizes, strict=True):
            pieces.append(jnp.reshape(flat[:, start : start + size], shape).astype(leaf_dtype))
            start += size
        return jax.tree.unflatten(structure, pieces)

    return flatten, unflatten


def norm(x: jax.Array) -> jax.Array:
    """Return the Euclidean norm over the last axis: (B, N) -> (B,), one norm per sample."""
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def relative_residual(absolute: jax.Array, size: jax.Array) -> jax.Array:
    """Return ||f(z) - z|| / ||f(z)||, (B,), from both norms (B,); a residual of zero is zero relative to any f(z)."""
    return jnp.where(absolute == 0, 0.0, absolute / size)


def check_state(z: Any) -> None:
    """Raise ValueError unless z is a pytree of real floating arrays that share a leading batch axis."""
    leaves = jax.tree_util.tree_leaves_with_path(z)
    if not leaves:
        raise ValueError("the state z0 is empty: it needs at least one array with a leading batch axis")
    batch = jnp.shape(leaves[0][1])[:1]
    for path, leaf in leaves:
        name = f"z0{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"{name} has dtype {jnp.result_type(leaf)}: a state must be real floating point")
        if not jnp.shape(leaf):
            raise ValueError(f"{name} is a scalar: every leaf of a state needs a leading batch axis")
        if jnp.shape(leaf)[:1] != batch:
            raise ValueError(f"{name} has batch size {jnp.shape(leaf)[0]}, but the first leaf has {batch[0]}")


def check_map(f: Callable[[Any], Any], z: Any) -> None:
    """Raise ValueError, naming the leaf, unless f(z) has the structure, shapes and dtypes of z. f is traced, not run."""
    out = jax.eval_shape(f, z)
    if jax.tree.structure(out) != jax.tree.structure(z):
        raise ValueError(f"f(z) has structure {jax.tree.structure(out)}, but z has {jax.tree.structure(z)}")
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(z), jax.tree.leaves(out), strict=True):
        if jnp.shape(want) != got.shape or jnp.result_type(want) != got.dtype:
            raise ValueError(
                f"f(z){jax.tree_util.keystr(path)} is {got.dtype}{list(got.shape)}, "
                f"but z there is {jnp.result_type(want)}{list(jnp.shape(want))}"
            )
