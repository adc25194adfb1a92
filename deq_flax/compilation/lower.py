"""The programs of a run's steps, from shapes alone: no array of the model, its optimizer or its data is made."""

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from deq_flax.config import Config, make_task, phases_of
from deq_flax.devices.mesh import TENSOR, by_batch, check_batch, compiler_options, make_mesh
from deq_flax.devices.sharding import bytes_on_device, gathered_shardings
from deq_flax.task import Task
from deq_flax.train.optimizer import make_optimizer
from deq_flax.train.step import TrainState, make_eval_step, make_train_step, split_model, state_shardings


@dataclass(frozen=True)
class LoweredStep:
    """A step of a run, ready to be compiled."""

    name: str
    """'train' or 'eval', or 'train, PHASE' for other kinds of training steps."""
    lowered: jax.stages.Lowered
    """The program, before any compiler has seen it."""
    options: dict[str, Any] | None
    """XLA's options for it; None: the defaults."""
    seconds: float
    """Time to trace and lower it."""
    kept: dict[str, int]
    """Bytes on one device of what stays there from step to step, by kind: parameters, optimizer, carry."""
    jaxpr: Any
    """The step as JAX traced it; within its shard_map, shapes are those of one shard."""
    shards: int
    """Devices of the axis `tensor`, which shapes in `jaxpr` do not show."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the program and XLA's options for it.

        Under one version of JAX, steps of one fingerprint compute the same; names and places of our source do not enter.
        """
        return hashlib.sha256(f"{self.options}\n{self.lowered.as_text()}".encode()).hexdigest()


@dataclass(frozen=True)
class CompiledStep:
    """A step of a run, compiled."""

    step: LoweredStep
    compiled: jax.stages.Compiled | None
    """The program; None if the compiler refused it, because it needs more memory than there is."""
    seconds: float
    """Time to trace, lower and compile it."""
    refused: int = 0
    """Bytes that the compiler wanted for a program that it refused."""


def compile_steps(
    config: Config, devices: Sequence[Any], *, names: Sequence[str] = ("train", "eval"), every_kind: bool = False
) -> Iterator[CompiledStep]:
    """Yield each step of a config, compiled for given devices; arguments and errors are those of `lower_steps`."""
    for step in lower_steps(config, devices, names=names, every_kind=every_kind):
        start = time.perf_counter()
        compiled, refused = _compile(step.lowered)
        yield CompiledStep(step, compiled, step.seconds + time.perf_counter() - start, refused)


def lower_steps(
    config: Config, devices: Sequence[Any], *, names: Sequence[str] = ("train", "eval"), every_kind: bool = False
) -> Iterator[LoweredStep]:
    """Yield each step of a config, lowered for given devices.

    Args:
      config: a config with a data set that needs no files; see `stand_in.without_data`.
      devices: the devices of a topology, or of this machine.
      names: the steps, of 'train' and 'eval'. The training step is that after pretraining, without the Jacobian loss unless all
        steps have it.
      every_kind: each kind of training step that a run can have: those of pretraining and with the Jacobian loss too.

    Raises:
      UserError: the mesh does not suit the devices, or the batch does not suit the mesh.
    """
    mesh, task, phases = make_mesh(config.mesh, devices), make_task(config), phases_of(config)
    options = config.train
    check_batch(mesh, batch_size=task.batch_size, accumulate=options.accumulate, eval_batch_size=task.eval_batch_size)
    transformation, schedule = make_optimizer(config.optimizer, options.steps)
    graphdef, params, variables = split_model(nnx.eval_shape(lambda: task.build_model(nnx.Rngs(options.seed))))
    model = nnx.merge(graphdef, params, variables)
    shardings = state_shardings(model, transformation, params, mesh, ema=bool(options.ema_decay))
    state = TrainState(
        params=params,
        variables=variables,
        opt_state=jax.eval_shape(transformation.init, params),
        carry=jax.eval_shape(lambda: task.fresh_carry(model, task.batch_size)),
        ema=params if options.ema_decay else None,
        skipped=jax.ShapeDtypeStruct((), jnp.int32),
    )
    state = TrainState(*(_sharded(tree, sharding) for tree, sharding in zip(state, shardings, strict=True)))
    scalars = jax.tree.map(_shape, phases.scalars(options.steps - 1))
    first, *others = phases.kinds()
    training = [("train", first), *((f"train, {kind}", kind) for kind in others if every_kind)]
    wanted = training if "train" in names else []
    if "eval" in names:
        wanted.append(("eval", phases.evaluation))
    for name, phase in wanted:
        start = time.perf_counter()
        if name != "eval":
            step: Any = make_train_step(
                task,
                graphdef,
                transformation,
                schedule,
                mesh,
                shardings,
                seed=options.seed,
                accumulate=options.accumulate,
                ema_decay=options.ema_decay,
            )
            batch = _batch(next(task.train_batches(0)), mesh)
            traced = step.trace(state, batch, scalars, _shape(np.int32(0)), phase=phase)
            kept = {"parameters": bytes_on_device((state.params, state.variables, state.ema))}
            kept |= {"optimizer": bytes_on_device(state.opt_state), "carry": bytes_on_device(state.carry)}
        else:
            traced, kept = _trace_eval(task, graphdef, mesh, phase, model, state, scalars)
        lowered = traced.lower()
        seconds = time.perf_counter() - start
        yield LoweredStep(name, lowered, compiler_options(mesh), seconds, kept, traced.jaxpr.jaxpr, mesh.shape[TENSOR])


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, int]:
    """Compile a program; or None, and the bytes it would need."""
    try:
        return lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
        # "... the total memory required for HLO temporaries (64.04G) exceeds available HBM (15.75G).", or "Used 23.05G of ..."
        needed = re.search(r"Ran out of memory.*?(?:\(|Used )([\d.]+)([KMGT])", str(error), re.DOTALL)
        if needed is None:
            raise
        return None, int(float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])))


def _trace_eval(
    task: Task, graphdef: Any, mesh: Mesh, phase: Any, model: Any, state: TrainState, scalars: Any
) -> tuple[jax.stages.Traced, dict[str, int]]:
    """Trace the evaluation step, for which parameters are whole but for what `tensor` splits."""
    params = _sharded(state.params, gathered_shardings(model, mesh))
    carry = _sharded(jax.eval_shape(lambda: task.fresh_carry(model, task.eval_batch_size)), by_batch(mesh))
    batch = _batch(task.eval_batches("valid")[0], mesh)
    kept = {"parameters": bytes_on_device((params, state.variables)), "optimizer": 0, "carry": bytes_on_device(carry)}
    step: Any = make_eval_step(task, graphdef, mesh, phase)
    return step.trace(params, state.variables, batch, carry, scalars), kept


def _batch(batch: Any, mesh: Mesh) -> Any:
    return _sharded(jax.tree.map(_shape, batch), by_batch(mesh))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype)


def _sharded(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings: a pytree like them, or one for all leaves."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
