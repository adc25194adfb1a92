"""One update, and one evaluation batch, as compiled functions of pure state.

The loss and its gradient run in a `shard_map` over the batch: every device solves its own part with its own number of
steps, and only gradients and metrics are summed over devices, once, after the solves. The update runs outside of it: it
sees whole gradients and parameters, of which each device happens to hold a part, so that norms over parameters and layers
are right by themselves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_flax.devices.mesh import BATCH, by_batch, compiler_options, replicated
from deq_flax.devices.sharding import (
    batch_axes,
    gather,
    manual_axes,
    manual_specs,
    named_shardings,
    opt_shardings,
    param_specs,
    reduce_scatter,
)
from deq_flax.task import Batch, Carry, Metrics, Task, average
from deq_flax.train.phases import Phase, Probes, StepScalars, make_probes, probe_metrics, regularized, solver_metrics


class TrainState(NamedTuple):
    """Everything that changes from step to step. All of it is checkpointed: a resumed run equals an uninterrupted one."""

    params: Any
    """Nested dictionary of arrays."""
    variables: Any
    """The model's other arrays, such as running statistics; nested dictionary, often empty."""
    opt_state: Any
    carry: Carry
    ema: Any
    """Running average of params, or None."""
    skipped: Any
    """int32: updates skipped in a row because something was not finite."""

    def checkpoint_trees(self) -> dict[str, Any]:
        """The items of a checkpoint by name."""
        rest = {name: getattr(self, name) for name in ("variables", "opt_state", "carry", "skipped")}
        return {"params": self.params, "rest": rest, "ema": self.ema}

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate with: their running average if there is one."""
        return self.params if self.ema is None else self.ema


TrainStep = Callable[..., tuple[TrainState, Metrics]]
EvalStep = Callable[..., tuple[Carry, Metrics]]

STEP_METRICS = (
    "forward_nfe",
    "forward_residual",
    "forward_unsolved",
    "backward_nfe",
    "backward_residual",
    "jacobian_loss",
    "consistency_loss",
    "grad_norm",
    "learning_rate",
)
"""Metrics that the steps add to the task's, in the order of the log."""


def state_shardings(
    model: nnx.Module, optimizer: optax.GradientTransformation, params: Any, mesh: Mesh, *, ema: bool
) -> TrainState:
    """Shardings of the state's arrays: a tree for parameters and optimizer, one for all arrays of each other field.

    Args:
      model: a model with the shapes and the metadata of the Params.
      optimizer: the optimizer whose state is sharded.
      params: the parameters; shapes suffice.
      mesh: mesh of the run.
      ema: keep a running average of the parameters.
    """
    by_param, everywhere = named_shardings(param_specs(model, mesh), mesh), replicated(mesh)
    return TrainState(
        params=by_param,
        variables=everywhere,
        opt_state=opt_shardings(optimizer, params, by_param, mesh),
        carry=by_batch(mesh),
        ema=by_param if ema else None,
        skipped=everywhere,
    )


def split_model(model: nnx.Module) -> tuple[Any, Any, Any]:
    """The model's graphdef, its parameters and its other variables; the latter two as nested dictionaries of arrays.

    Plain dictionaries, because dispatching a step with thousands of arrays costs a third of what NNX states do.
    """
    graphdef, params, variables = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(variables)


def make_train_step(
    task: Task,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    mesh: Mesh,
    shardings: TrainState,
    *,
    seed: int,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> TrainStep:
    """Compile `step(state, batch, scalars, number, phase=)` -> (next state, metrics); `state` is donated, `phase` static.

    Randomness depends on the seed, the step's number and the part of the batch alone. An update whose loss or gradient is not
    finite leaves everything, the carry too, as it was, and is counted.

    Args:
      shardings: shardings of the state, before and after; see `state_shardings`.
      seed: seed of dropout and of the Jacobian loss's vectors.
      accumulate: number of micro-batches, taken one after the other; their gradients are averaged.
      ema_decay: decay of the running average of the parameters; 0: none.
    """
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings.params)

    def gradients(
        params: Any, batch: Batch, carry: Carry, variables: Any, key: jax.Array, phase: Phase, scalars: StepScalars
    ) -> tuple:
        def loss(params: Any, probes: Probes) -> tuple[jax.Array, tuple[Carry, Metrics, Any]]:
            model = nnx.merge(graphdef, params, variables, copy=True)
            value, output = task.loss(model, batch, carry, solve=phase.solve(scalars, key=key, probes=probes), key=key)
            metrics = output.metrics | solver_metrics(output.stats, output.jacobian_loss)
            value = regularized(value, output.jacobian_loss, scalars)
            return value, (output.carry, metrics, split_model(model)[2])

        (value, aux), (gradient, report) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, make_probes())
        return value, gradient, report, *aux

    def local(
        stored: Any, variables: Any, carry: Carry, batch: Batch, scalars: StepScalars, number: jax.Array, *, phase: Phase
    ) -> tuple:
        """Compute one device's part of the batch. Returns means over all devices, gradients in the parts that are stored."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), jax.lax.axis_index(BATCH))
        params = gather(stored, specs)

        def micro(carried: tuple[Any, Any], part: tuple[Batch, Carry, jax.Array]) -> tuple:
            total, variables = carried
            batch, carry, key = part
            value, gradient, report, carry, metrics, variables = gradients(params, batch, carry, variables, key, phase, scalars)
            total = jax.tree.map(jnp.add, total, (value, gradient, report))
            return (total, variables), (carry, metrics)

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), make_probes())
        parts = _micro_batches((batch, carry), accumulate)
        (total, variables), (carry, metrics) = _scan(micro, (zero, variables), (*parts, jax.random.split(key, accumulate)))
        value, gradient = jax.tree.map(lambda x: x / accumulate, total[:2])
        value, variables = jax.lax.pmean((value, variables), batch_axes(mesh))
        carry = _joined(carry)
        metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
        metrics |= probe_metrics(total[2])
        return value, reduce_scatter(gradient, specs, mesh), variables, carry, jax.lax.psum(metrics, batch_axes(mesh))

    def update(
        proposed: TrainState, state: TrainState, value: jax.Array, gradient: Any, metrics: Metrics
    ) -> tuple[TrainState, Metrics]:
        norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - ema_decay)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & _all_finite((proposed.carry, proposed.variables))
        proposed = proposed._replace(params=params, opt_state=opt_state, ema=ema)
        chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, state)
        state_after = chosen._replace(skipped=(state.skipped + 1) * (1 - finite.astype(jnp.int32)))
        # A skipped step counts in `skipped`, not in the averages.
        metrics = metrics | {
            "grad_norm": average(norm),
            "learning_rate": average(schedule(_updates_done(state_after.opt_state))),
        }
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)
        return state_after, metrics | {"skipped": average(state_after.skipped)}

    @partial(
        jax.jit,
        static_argnames="phase",
        donate_argnames="state",
        out_shardings=(shardings, NamedSharding(mesh, P())),
        compiler_options=compiler_options(mesh),
    )
    def step(state: TrainState, batch: Batch, scalars: StepScalars, number: Any, *, phase: Phase) -> tuple[TrainState, Metrics]:
        stored = manual_specs(specs)
        value, gradient, variables, carry, metrics = jax.shard_map(
            partial(local, phase=phase),
            mesh=mesh,
            in_specs=(stored, P(), P(BATCH), P(BATCH), P(), P()),
            out_specs=(P(), stored, P(), P(BATCH), P()),
            axis_names=manual_axes(mesh),
            check_vma=False,
        )(state.params, state.variables, state.carry, batch, scalars, number)
        # The specs of the shard_map leave out the axes that are split over `tensor`.
        gradient = jax.lax.with_sharding_constraint(gradient, shardings.params)
        return update(state._replace(variables=variables, carry=carry), state, value, gradient, metrics)

    return step


def make_eval_step(task: Task, graphdef: Any, mesh: Mesh, phase: Phase) -> EvalStep:
    """Compile `step(params, variables, batch, carry, scalars)` -> (next carry, metrics).

    Nothing is random, and nothing but the carry is remembered; `scalars` may limit the evaluations. `params` are whole on every
    device, but for what `tensor` splits. `phase`: the phase of evaluation.
    """

    def local(params: Any, variables: Any, batch: Batch, carry: Carry, scalars: StepScalars) -> tuple[Carry, Metrics]:
        model = nnx.merge(graphdef, params, variables, copy=True)
        _, output = task.loss(model, batch, carry, solve=phase.solve(scalars))
        metrics = output.metrics | solver_metrics(output.stats, output.jacobian_loss)
        return output.carry, jax.lax.psum(metrics, batch_axes(mesh))

    @partial(jax.jit, donate_argnums=3, compiler_options=compiler_options(mesh))
    def step(params: Any, variables: Any, batch: Batch, carry: Carry, scalars: StepScalars) -> tuple[Carry, Metrics]:
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P(), P(BATCH), P(BATCH), P()),
            out_specs=(P(BATCH), P()),
            axis_names=manual_axes(mesh),
            check_vma=False,
        )(params, variables, batch, carry, scalars)

    return step


def _micro_batches(tree: Any, parts: int) -> Any:
    """Leaves (B, ...) as (parts, B / parts, ...)."""
    return jax.tree.map(lambda x: jnp.reshape(x, (parts, x.shape[0] // parts, *x.shape[1:])), tree)


def _joined(parts: Any) -> Any:
    """Undo `_micro_batches`. Where another axis is empty, as in a memory of length 0, no size can be inferred from -1."""
    return jax.tree.map(lambda x: jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])), parts)


def _scan(f: Callable, init: Any, xs: Any) -> Any:
    """`lax.scan`, but a single iteration is inlined: the compiler then sees no loop around the step."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(f, init, xs)
    last, out = f(init, jax.tree.map(lambda x: x[0], xs))
    return last, jax.tree.map(lambda x: x[None], out)


def _updates_done(opt_state: Any) -> jax.Array:
    """The count that drives the learning-rate schedule."""
    return optax.tree.get(
        opt_state, "count", filtering=lambda path, _: path[-1].tuple_name == optax.ScaleByScheduleState.__name__
    )


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)
