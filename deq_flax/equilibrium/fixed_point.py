"""`fixed_point`: the library in one function. States are flattened here, once: solvers and gradients work on (B, N)."""

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from deq_flax.equilibrium.gradients import Gradient, Implicit, PhantomGradient, Unroll, backward_probe
from deq_flax.equilibrium.gradients.base import attach, stopped
from deq_flax.equilibrium.linear import LinearSolver
from deq_flax.equilibrium.loop import Solver
from deq_flax.equilibrium.shards import axes_of, cast, checked, communicates, unite, varying
from deq_flax.equilibrium.solution import FlatMap, Solution, SolverStats, over_samples
from deq_flax.equilibrium.solvers.broyden import Broyden

OnFailure = Literal["return", "nan", "zero_gradient"]
ON_FAILURE = ("return", "nan", "zero_gradient")


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    max_steps: jax.Array | int | None = None,
    probe: jax.Array | None = None,
    on_failure: OnFailure = "return",
    batched: bool = True,
    has_aux: bool = False,
) -> Solution:
    """Solve z = f(z, *args), differentiably.

    >>> W = 0.3 * jax.random.normal(jax.random.key(0), (8, 8)) / 8**0.5
    >>> x = jnp.ones((2, 8))
    >>> sol = fixed_point(lambda z, x: jnp.tanh(z @ W + x), jnp.zeros_like(x), x)
    >>> sol.value.shape, bool(sol.stats.converged.all())
    ((2, 8), True)

    On a sharded batch, call it inside `jax.shard_map`: each shard then stops by itself, and the loop contains no collective. If
    f itself communicates over an axis of the mesh (tensor parallelism, statistics of the whole batch), the shards must stop
    together: name the axis in the solver, `Broyden(axis_name="model")`, and with it norms and inner products are sums over its
    shards. A state that is whole on every shard counts once for each in the absolute residual. An f that holds a
    `jax.shard_map` of its own needs none of this: its shards end with each evaluation.

    Args:
      f: called as f(z, *args); returns a pytree with the structure, shapes and dtypes of z. It may close over traced
        values and modules: they are differentiated like `args`.
      z0: initial guess: a pytree of real floating arrays that share a leading batch axis, (B, ...), such as an earlier
        solution. It gets no gradient.
      *args: pytrees, passed to f unchanged.
      solver: forward solver; default `Broyden()`.
      gradient: way to differentiate the solution; default `Implicit()`.
      max_steps: lower limit on evaluations for this call; may be traced, so that it can change without recompiling. A traced
        one is clipped to the range from 1 to the solver's limit, or to the steps of `Unroll`.
      probe: `backward_probe()`, to get statistics of the adjoint solve.
      on_failure: gradient of a sample that did not converge. 'return': the gradient at its best iterate. 'nan': NaN, which
        makes the failure visible. 'zero_gradient': its cotangent becomes zero, so that it contributes nothing to the
        gradients of shared parameters, except NaN if f is not finite at its z0, or its slope not at its best iterate, since 0
        times NaN is NaN. `Unroll` and `PhantomGradient`, whose differentiated steps may overflow for such a sample, take the
        forward pass twice: the second time it stays at its z0.
      batched: False if the leaves of z0 have no batch axis: a single problem. f then gets them as they are, and the arrays of
        the statistics have no batch axis either. This is the way for an f that couples what it gets: statistics of a batch,
        nodes of a graph. With True each sample is a problem of its own, and f should treat it so. `stats.converged` is true of
        the returned value even if f does not, but convergence suffers, the residuals of samples at the limit are those seen
        when their iterates were found, among others of other samples, and the gradient may be far from the exact one: of an
        adjoint equation that did not converge, see `probe`, or of `Reversible`, wrong.
      has_aux: f returns a pair (z, aux). `Solution.aux` is then the aux at the returned iterate, a pytree of anything,
        differentiable in the iterate and in all that f depends on. This takes one more evaluation of f, which `stats.nfe`
        does not count. `on_failure` applies to the iterate only: aux keeps its direct dependence on parameters.

    Returns:
      `Solution(value, stats, trajectory, aux)`. Not converging is not an error: see `stats.converged`. With
      `Solver.trajectory_steps` each iterate of the trajectory has the gradient of one evaluation of f at it, held constant
      (the inexact gradient of Bai et al. 2022, for the correction loss: `fixed_point_correction_loss`).

    Raises:
      TypeError: solver is not a `Solver`, or gradient no gradient, or max_steps no whole number, or probe no array of floats.
      ValueError: z0 is not such a pytree, f returns something unlike z or communicates over an axis that the solver does not
        name, on_failure is unknown, the probe has another shape, or max_steps is out of range. No solve has run then.
    """
    solver = Broyden() if solver is None else solver
    gradient = Implicit() if gradient is None else gradient
    check_solver(solver)
    check_gradient(gradient, on_failure)
    if isinstance(gradient, Unroll):
        check_max_steps(max_steps, gradient.steps, "the steps of Unroll")
    else:
        check_max_steps(max_steps, solver.max_steps)
    if probe is not None:
        check_probe(probe)
    z0 = jax.tree.map(jnp.asarray, z0)
    if not batched:
        z0 = jax.tree.map(lambda leaf: leaf[None], z0)
    flatten, unflatten = flattener(z0)

    def evaluate(z: Any) -> tuple[Any, Any]:
        """f(z) and aux for a z with a batch axis."""
        out = f(z if batched else jax.tree.map(lambda leaf: leaf[0], z), *args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"with has_aux=True f must return a pair (z, aux), not {type(out).__name__}")
        fz, aux = out if has_aux else (out, None)
        return fz if batched else jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], fz), aux

    fz0 = check_map(lambda z: evaluate(z)[0], z0, solver)
    axes = varying((z0, fz0)) | checked(solver.axis_name)

    flat = flat_map(lambda z: evaluate(z)[0], flatten, unflatten)

    def flat_f(x: jax.Array) -> jax.Array:
        return cast(flat(x), axes)

    x0 = cast(jax.lax.stop_gradient(flatten(z0)), axes)

    def run(f: FlatMap) -> tuple[jax.Array, SolverStats]:
        return gradient(f, x0, solver, max_steps, probe)

    held = on_failure == "zero_gradient" and isinstance(gradient, Unroll | PhantomGradient)
    x, stats = _held_where_failed(run, flat_f, x0) if held else run(flat_f)
    stats = jax.lax.stop_gradient(stats)
    trajectory = None if stats.trajectory is None else jax.vmap(unflatten)(_one_step_gradient(flat_f, stats.trajectory))
    if on_failure != "return":
        x = _gate(x, stats.converged == 0, on_failure)
    value = jax.tree.map(lambda leaf, like: unite(leaf, checked(solver.axis_name) - varying(like)), unflatten(x), fz0)
    aux = evaluate(value)[1] if has_aux else None
    solution = Solution(value=value, stats=replace(stats, trajectory=None), trajectory=trajectory, aux=aux)
    return solution if batched else _without_batch(solution)


def flattener(z: Any) -> tuple[Callable[[Any], jax.Array], Callable[[jax.Array], Any]]:
    """Return `flatten` and `unflatten` for pytrees like z.

    The flat array is float32, or float64 if a leaf of z is. A bfloat16 state is iterated in float32, because solver history
    in bfloat16 stalls Anderson acceleration at residuals of 1e-2. `unflatten` restores the dtype of each leaf; the round trip
    is exact.

    Raises:
      ValueError: a leaf has no batch axis, another batch size than the first leaf, or no real floating dtype.
    """
    leaves, structure = jax.tree.flatten(z)
    _check_state(z)
    shapes = [leaf.shape for leaf in leaves]
    dtypes = [leaf.dtype for leaf in leaves]
    sizes = [math.prod(shape[1:]) for shape in shapes]
    dtype = jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)

    def flatten(tree: Any) -> jax.Array:
        parts = [jnp.reshape(leaf, (len(leaf), math.prod(leaf.shape[1:]))).astype(dtype) for leaf in jax.tree.leaves(tree)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def unflatten(flat: jax.Array) -> Any:
        pieces, start = [], 0
        for shape, leaf_dtype, size in zip(shapes, dtypes, sizes, strict=True):
            pieces.append(jnp.reshape(flat[:, start : start + size], shape).astype(leaf_dtype))
            start += size
        return jax.tree.unflatten(structure, pieces)

    return flatten, unflatten


def flat_map(f: Callable[[Any], Any], flatten: Callable[[Any], jax.Array], unflatten: Callable[[jax.Array], Any]) -> FlatMap:
    """Return f as a map of flat states.

    Where a leaf has a narrower dtype than the flat array, what `unflatten` rounds off is added to f(z) as a constant: the
    residual, f(z) - z, is then that of the rounded state, which f gets and the solution has.
    """

    def flat_f(x: jax.Array) -> jax.Array:
        z = unflatten(x)
        fx = flatten(f(z))
        rounded = any(leaf.dtype != x.dtype for leaf in jax.tree.leaves(z))
        return fx + jax.lax.stop_gradient(x - flatten(z)) if rounded else fx

    return flat_f


def _check_state(z: Any) -> None:
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


def check_map(f: Callable[[Any], Any], z: Any, solver: Solver) -> Any:
    """Return the shapes of f(z), which is traced, not run.

    Raises:
      ValueError: structure, shapes or dtypes are not those of z, or f communicates over an axis that the solver does not know.
    """
    jaxpr, out = jax.make_jaxpr(f, return_shape=True)(z)
    if missing := sorted(communicates(jaxpr.jaxpr) - axes_of(solver.axis_name)):
        raise ValueError(
            f"f communicates over the axis {missing[0]!r}, where all shards must take the same steps: name it in the solver's "
            f"axis_name, {type(solver).__name__}(axis_name={missing[0]!r})"
        )
    if jax.tree.structure(out) != jax.tree.structure(z):
        raise ValueError(f"f(z) has structure {jax.tree.structure(out)}, but z has {jax.tree.structure(z)}")
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(z), jax.tree.leaves(out), strict=True):
        if jnp.shape(want) != got.shape or jnp.result_type(want) != got.dtype:
            raise ValueError(
                f"f(z){jax.tree_util.keystr(path)} is {got.dtype}{list(got.shape)}, "
                f"but z there is {jnp.result_type(want)}{list(jnp.shape(want))}"
            )
    return out


def check_solver(solver: Any) -> None:
    """Raise TypeError unless it is a forward solver."""
    if isinstance(solver, Solver):
        return
    if isinstance(solver, LinearSolver) and not isinstance(solver, type):
        name = type(solver).__name__
        raise TypeError(f"{name} solves linear equations only: use it for the adjoint, gradient=Implicit(solver={name}(...))")
    raise TypeError(f"solver must be a Solver such as Broyden(), not {solver!r}")


def check_gradient(gradient: Any, on_failure: Any) -> None:
    """Raise TypeError or ValueError, as `fixed_point` does, unless these can be its arguments."""
    if isinstance(gradient, type) or not callable(gradient):
        raise TypeError(f"gradient must be an object such as Implicit(), not {gradient!r}")
    if on_failure not in ON_FAILURE:
        raise ValueError(f"unknown on_failure {on_failure!r}; known: {', '.join(ON_FAILURE)}")


def check_max_steps(max_steps: Any, limit: int, what: str = "the solver's own limit") -> None:
    """Raise TypeError or ValueError unless a limit for one call is None, or a whole number, from 1 to `limit` if not traced."""
    if max_steps is None:
        return
    if isinstance(max_steps, Tracer):
        if max_steps.shape or not jnp.issubdtype(max_steps.dtype, jnp.integer):
            raise TypeError(f"max_steps must be a whole number, not a traced {max_steps.dtype}{list(max_steps.shape)}")
        return
    try:
        steps = operator.index(max_steps)
    except TypeError:
        raise TypeError(f"max_steps must be a whole number, not {max_steps!r}") from None
    if isinstance(max_steps, bool):
        raise TypeError(f"max_steps must be a whole number, not {max_steps}")
    if not 1 <= steps <= limit:
        raise ValueError(f"max_steps must be from 1 to {what}, {limit}, not {steps}: that is a limit it lowers")


def check_probe(probe: Any) -> None:
    """Raise TypeError or ValueError unless it may be that of `backward_probe`."""
    if not hasattr(probe, "dtype") or not jnp.issubdtype(probe.dtype, jnp.floating):
        kind = getattr(probe, "dtype", type(probe).__name__)
        raise TypeError(f"probe must be the array of backward_probe(), of floating dtype, not {kind}")
    if probe.shape != backward_probe().shape:
        raise ValueError(f"probe must be the array of backward_probe(), of shape (3,), not {probe.shape}")


def _one_step_gradient(f: FlatMap, trajectory: jax.Array) -> jax.Array:
    """Return the iterates (S, B, N), each with the gradient of one evaluation of f at it."""
    return jax.vmap(lambda x: attach(x, f(x)))(trajectory)


def _held_where_failed(run: Callable[[FlatMap], tuple[jax.Array, SolverStats]], f: FlatMap, x0: jax.Array) -> Any:
    """Return run(f), but differentiate the steps that failed samples take at x0, where 0 times their slope is 0."""
    x, stats = jax.lax.stop_gradient(run(stopped(f)))
    failed = (stats.converged == 0)[:, None]
    return attach(x, run(lambda x: f(jnp.where(failed, x0, x)))[0]), stats


def _gate(x: jax.Array, failed: jax.Array, on_failure: OnFailure) -> jax.Array:
    """Return x, (B, N), with the gradient of the samples in `failed`, (B,), replaced."""
    if on_failure == "zero_gradient":
        return jnp.where(failed[:, None], jax.lax.stop_gradient(x), x)
    return attach(jax.lax.stop_gradient(x), x * jnp.where(failed, jnp.nan, 1.0).astype(x.dtype)[:, None])


def _without_batch(solution: Solution) -> Solution:
    """Remove the batch axis of one; aux has none."""
    trajectory = jax.tree.map(lambda leaf: leaf[:, 0], solution.trajectory)
    return replace(over_samples(lambda leaf: leaf[0], solution), trajectory=trajectory)
