"""The programs of a config that benchmarks time and analyze: evaluations of f, vector-Jacobian products, training steps.

The sum of parts of a step: its evaluations of f and its vector-Jacobian products, each alone in a loop, and the rest
(embedding or stem, context, one vector-Jacobian product with the parameters, loss, optimizer), timed as a step with one
unrolled evaluation, less that evaluation. A compiler can fuse across parts, so that a step may take less than their sum.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a worker that times PyTorch never imports JAX
    from deq_flax.config import Config
    from deq_flax.train.phases import Phase

FIRST = 4
"""Steps whose batches and limits enter a fingerprint."""
CASES = ("f", "vjp", "step of one evaluation", "step")


def resolved(path: str, changes: Mapping[str, Any] | None = None) -> "Config":
    """The config RECIPE or FILE, with `:VARIANT` or without, changed in the sections it has.

    `changes`: 'section.key' or 'section.options.key' -> value.
    """
    from deq_flax.config import resolve, section_types
    from deq_flax.config_files import load_config

    mapping = load_config(path)
    for path, value in (changes or {}).items():
        *sections, key = path.split(".")
        if sections[0] in section_types(mapping):
            reduce(lambda part, name: part.setdefault(name, {}), sections, mapping)[key] = value
    return resolve(mapping)


def fingerprint(config: "Config", *names: str) -> str:
    """SHA-256, in hexadecimal, of what a run of a config computes: a result of the same fingerprint need not be made again.

    It is that of the initialization, of each kind of the steps in `names` ('train', 'eval') as this version of JAX lowers it,
    and of their numbers: the first batches of training, all of validation and test, the random limits of the first steps.
    """
    import jax
    from flax import nnx

    from deq_flax.compilation.lower import lower_steps
    from deq_flax.config import make_task, phases_of
    from deq_flax.train.step import split_model

    task, phases = make_task(config), phases_of(config)
    initialized = jax.jit(lambda: split_model(task.build_model(nnx.Rngs(config.train.seed)))[1:])
    digest = hashlib.sha256(initialized.lower().as_text().encode())
    for step in lower_steps(config, jax.devices()[:1], names=names, every_kind=True):
        digest.update(step.fingerprint.encode())
    numbers = [[phases.scalars(step) for step in range(FIRST)], [*islice(task.train_batches(0), FIRST)]]
    numbers += [[*task.eval_batches(split)] for split in ("valid", "test")]
    for array in jax.tree.leaves(numbers):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def exactly(steps: int) -> dict[str, Any]:
    """Changes to a config: exactly this number of evaluations each way, nothing random, no Jacobian loss."""
    limits = {"tol": 0.0, "max_steps": steps, "backward_tol": 0.0, "backward_max_steps": steps, "max_steps_jitter": 0}
    pretraining = {"pretrain_steps": 0, "pretrain_layers": 1, "jacobian_weight": 0.0, "jacobian_frequency": 0.0}
    return {f"deq.{name}": value for name, value in (limits | pretraining).items()}


def words(vocabulary: int, count: int) -> np.ndarray:
    """Random word ids, (count,) int32, as rare as in a text: id r has a probability proportional to 1 / (r + 1)."""
    weights = 1 / np.arange(1, vocabulary + 1)
    return np.random.default_rng(0).choice(vocabulary, count, p=weights / weights.sum()).astype(np.int32)


def text(folder: str, vocabulary: int, count: int) -> dict[str, Any]:
    """Changes to a config: a text of `count` random tokens, which is saved in `folder`."""
    for split in ("train", "valid", "test"):
        np.save(Path(folder) / f"{split}.npy", words(vocabulary, count))
    return {"data.name": "tokens", "data.path": folder, "data.cache": "", "model.vocab_size": vocabulary}


def images(folder: str, count: int) -> dict[str, Any]:
    """Changes to a config: files like CIFAR-10's with `count` images of noise each, which are saved in `folder`."""
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = random.integers(0, 256, (count, 1 + 3072)).astype(np.uint8)
        records[:, 0] %= 10
        (Path(folder) / f"{name}.bin").write_bytes(records.tobytes())
    return {"data.path": folder, "data.augment": "none", "data.pictures": 0}


def timing_text(folder: str, steps: int) -> dict[str, Any]:
    """Changes to `configs/wt103.py`: the sizes at which libraries are compared, 10,000 words, 256 features, 8 x 64 tokens."""
    sizes = {"d_model": 256, "d_embed": 256, "n_head": 8, "d_head": 32, "d_inner": 1024, "mem_len": 64, "dropout": 0.0}
    sizes |= {"cutoffs": (2_000, 5_000), "div_value": 4}
    data = {"batch_size": 8, "seq_len": 64, "eval_batch_size": 8, "eval_seq_len": 64}
    changes = {f"model.{name}": value for name, value in sizes.items()} | {
        f"data.{name}": value for name, value in data.items()
    }
    return changes | text(folder, 10_000, 20 * 8 * 64 + 1) | exactly(steps) | {"optimizer.warmup_steps": 0}


class Training:
    """A run of a config on one device, at its first step."""

    def __init__(self, config: "Config"):
        from deq_flax.config import make_task, phases_of
        from deq_flax.devices.mesh import MeshOptions, make_mesh
        from deq_flax.train.loop import Run

        self.config, self.task, self.phases = config, make_task(config), phases_of(config)
        self.batch = next(self.task.train_batches(0))
        self.run = Run(self.task, self.phases, config.train, make_mesh(MeshOptions(data=1)), config.optimizer)
        self.arguments = (self.batch, self.phases.scalars(0), np.int32(0))

    def phase(self, *, unrolled: bool = False, jacobian_loss: bool = False) -> "Phase":
        """The phase of a training step; `unrolled`: through `deq.pretrain_layers` evaluations instead of a solve."""
        from deq_flax.train.phases import make_phases

        deq = self.config.deq
        phases = self.phases if deq is None else make_phases(replace(deq, pretrain_steps=int(unrolled)))
        return replace(phases.phase(0), jacobian_loss=jacobian_loss)

    def stepping(self, *, unrolled: bool = False) -> Callable[[], None]:
        """A program that takes a step; `unrolled` as for `phase`."""
        import jax

        phase = self.phase(unrolled=unrolled)

        def step() -> None:
            self.run.state, metrics = self.run.train_step(self.run.state, *self.arguments, phase=phase)
            jax.block_until_ready(metrics)

        return step

    def traced(self, *, unrolled: bool = False, jacobian_loss: bool = False) -> Any:
        """The step as traced by JAX: `.jaxpr` to inspect it, `.lower().compile()` to analyze it."""
        phase = self.phase(unrolled=unrolled, jacobian_loss=jacobian_loss)
        return self.run.train_step.trace(self.run.state, *self.arguments, phase=phase)

    def equation(self, model: Any) -> tuple[Callable, Any]:
        """(f, z0) of a model for the batch, with a full memory."""
        import jax.numpy as jnp

        if "images" in self.batch:
            return model.equation(self.task.normalize(jnp.asarray(self.batch["images"])))[:2]
        rows, memory = self.task.batch_size, model.fresh_memory(self.task.batch_size)
        return model.equation(self.batch["inputs"], memory._replace(length_B=jnp.full((rows,), model.options.mem_len)))[:2]

    def loops(self) -> tuple[Callable, Callable]:
        """deq.max_steps evaluations of f, and of its vector-Jacobian product, as functions of (params, variables)."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from deq_flax.train.step import split_model

        graph, *_ = split_model(self.run.model)
        steps = self.config.deq.max_steps

        def f(params: Any, variables: Any) -> Any:
            f, z0 = self.equation(nnx.merge(graph, params, variables, copy=True))
            return jax.lax.fori_loop(0, steps, lambda _, z: f(z), z0)

        def vjp(params: Any, variables: Any) -> Any:
            f, z0 = self.equation(nnx.merge(graph, params, variables, copy=True))
            _, pullback = jax.vjp(f, z0)
            return jax.lax.fori_loop(0, steps, lambda _, v: pullback(v)[0], jax.tree.map(jnp.ones_like, z0))

        return f, vjp

    def programs(self) -> dict[str, Callable[[], None]]:
        """The programs to time, by case."""
        import jax

        from deq_flax.devices.mesh import compiler_options

        def at_current_weights(function: Callable) -> Callable[[], None]:
            run = self.run  # whose arrays change with every step
            compiled = jax.jit(function, compiler_options=compiler_options(run.devices))
            return lambda: jax.block_until_ready(compiled(run.state.params, run.state.variables))

        f, vjp = map(at_current_weights, self.loops())
        return {"f": f, "vjp": vjp, "step of one evaluation": self.stepping(unrolled=True), "step": self.stepping()}


def sum_of_parts(seconds: Mapping[str, float], steps: int, evaluations_of_one: int) -> float:
    """The sum of a step's parts, in seconds, from the times of the cases.

    `evaluations_of_one`: evaluations of f in the step of one evaluation: ours has two, one of them for the residual it reports.
    """
    f, vjp = seconds["f"] / steps, seconds["vjp"] / steps
    return seconds["f"] + seconds["vjp"] + seconds["step of one evaluation"] - evaluations_of_one * f - vjp
