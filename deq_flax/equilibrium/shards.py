"""Solves inside `jax.shard_map`: the types of values that vary over mesh axes, and sums over the shards of one state.

Where `check_vma` is on, its default, the type of a value says over which mesh axes it varies, and the carry of a loop keeps its
type: a constant that it starts from must first be cast to what the loop makes of it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

AxisName = str | tuple[str, ...]
"""Axes of the mesh of a `jax.shard_map`, or of a `jax.vmap` with `axis_name`."""


def varying(tree: Any) -> frozenset[str]:
    """Return the mesh axes over which some leaf of a pytree of arrays or shapes varies: none where `check_vma` is off."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def cast(tree: Any, axes: frozenset[str]) -> Any:
    """Return the leaves with types that vary over `axes` too. Its transpose sums over the axes that were missing."""

    def cast_leaf(leaf: Any) -> Any:
        missing = tuple(sorted(axes - varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast_leaf, tree)


def settled(body: Callable[[Any], Any], start: Any) -> Any:
    """Return the start of a loop, each leaf cast to the type that it takes in the loop."""
    while varying(start):
        end = jax.eval_shape(body, start)
        after = jax.tree.map(lambda a, b: cast(a, varying(b)), start, end)
        if all(varying(a) == varying(b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(after), strict=True)):
            break
        start = after
    return start


def axes_of(axis_name: AxisName | None) -> frozenset[str]:
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())


def checked(axis_name: AxisName | None) -> frozenset[str]:
    """Return those of the axes for which `check_vma` is on."""
    return frozenset(axis for axis in axes_of(axis_name) if axis in varying(jax.lax.axis_index(axis)))


def total(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Return the sum of x over the shards of these axes."""
    return jax.lax.psum(x, axis_name) if axis_name else x


def maximum(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Return the largest x of the shards of these axes."""
    return jax.lax.pmax(x, axis_name) if axis_name else x


def unite(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Return x, which is the same on all shards of these axes, with a type that says so."""
    return jax.lax.pmean(x, tuple(sorted(axes))) if axes else x


COLLECTIVES = ("psum", "pmax", "pmin", "ppermute", "all_gather", "all_to_all", "reduce_scatter", "ragged_all_to_all")
"""Primitives that wait for other shards; the names of some have an ending."""


def communicates(jaxpr: Jaxpr) -> frozenset[str]:
    """Return the named axes over which a program communicates, but for those of a `jax.shard_map` that it holds itself."""
    axes = set()
    for equation in jaxpr.eqns:
        values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
        if equation.primitive.name.startswith(COLLECTIVES):
            axes |= {value for value in values if isinstance(value, str)}
        for value in values:
            if isinstance(value, Jaxpr | ClosedJaxpr):
                within = communicates(value.jaxpr if isinstance(value, ClosedJaxpr) else value)
                axes |= within - equation.params.get("newly_manual_axes", frozenset())
    return frozenset(axes)
