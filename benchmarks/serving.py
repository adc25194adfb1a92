"""Problems a second through the slots of `fixed_point_queue`, beside plain batches of as many rows.

    pip install -r requirements.txt
    python -m benchmarks.serving [--rounds 5] [--write]

Both solve the same problems, each to the same tolerance. The models are trained here first, four minutes on two cores. Seconds
are those of processor time, in one thread, medians of rounds in turns.
"""

import os
from collections.abc import Callable, Iterator
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import tables, turns


class Case(NamedTuple):
    """Problems z = f(z, *inputs), a row of z0 and inputs each."""

    name: str
    f: Callable[..., Any]
    z0: Any
    inputs: Any
    solver: Any
    slots: int


def layers(name: str, solver: Any, *, count: int = 1024) -> Case:
    """tanh layers of eight rows and 128 features whose gains are log-normal: few hard ones among many that are easy."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 3)
    W = jax.random.normal(keys[0], (128, 128)) / 128**0.5
    x = jax.random.normal(keys[1], (count, 8, 128))
    gain = jnp.minimum(0.12 * jnp.exp(jax.random.normal(keys[2], (count, 1, 1))), 0.95)
    return Case(name, lambda z, x, gain: jnp.tanh(gain * (z @ W) + x), jnp.zeros_like(x), (x, gain), solver, 32)


def images(trained: Any, count: int) -> tuple[Any, Any, Any]:
    """The equations of a multiscale DEQ for images of the training set."""
    import jax.numpy as jnp

    examples = trained.task.images.train.read(np.arange(count), None)
    f, z0, injection = trained.run.model.equation(trained.task.normalize(jnp.asarray(examples["images"])))
    return f, z0, (injection,)


def segments(trained: Any, count: int) -> tuple[Any, Any, Any]:
    """The equations of a DEQ-Transformer for texts that begin anew, as in serving: what differs is the injection alone."""
    import jax.numpy as jnp

    model, batches, tokens = trained.run.model, trained.task.train_batches(0), []
    while sum(map(len, tokens)) < count:
        tokens.append(next(batches)["inputs"])
    tokens_BL = jnp.asarray(np.concatenate(tokens)[:count])
    memory = model.fresh_memory(count)
    equation = model.equation(tokens_BL, memory)

    def f(z_BLD: Any, tokens_BL: Any) -> Any:
        return model.equation(tokens_BL, model.fresh_memory(len(tokens_BL))).f(z_BLD)

    return f, equation.z0_BLD, (tokens_BL,)


def puzzles(trained: Any, count: int) -> tuple[Any, Any, Any]:
    """The equations of a reasoner for puzzles of the largest size."""
    examples = list(trained.task.puzzles.larger.values())[-1].read(np.arange(count), None)
    f, z0, x = trained.run.model.equation(examples["inputs"])
    return f, z0, (x,)


def trained(config: str, changes: dict[str, Any]) -> Any:
    """A run after all its steps."""
    from flax import nnx

    from benchmarks.training import Training, resolved

    it = Training(resolved(config, changes))
    for number, batch in zip(range(it.config.train.steps), it.task.train_batches(0), strict=False):
        phase, scalars = it.phases.phase(number), it.phases.scalars(number)
        it.run.state, _ = it.run.train_step(it.run.state, batch, scalars, np.int32(number), phase=phase)
    nnx.update(it.run.model, it.run.state.params, it.run.state.variables)
    return it


def cases() -> Iterator[Case]:
    """All of them; a model is trained when its first case is asked for."""
    from benchmarks.language import REGULARIZED
    from benchmarks.reasoning import MAZE, unrolled
    from deq_flax import Anderson, Broyden, Picard

    yield layers("1024 tanh layers (8, 128) of log-normal gain, `Anderson(1e-3, 60)`", Anderson(1e-3, 60))
    yield layers("the same, `Broyden(1e-3, 40, memory=10)`", Broyden(1e-3, 40, memory=10))
    digits = images(trained("configs/digits.py", {}), 480)
    yield Case("480 digits, a multiscale DEQ, `Broyden(1e-2, 30)`", *digits, Broyden(1e-2, 30), 16)
    yield Case("the same, `Broyden(1e-3, 30)`", *digits, Broyden(1e-3, 30), 16)
    mazes = puzzles(trained("configs/maze.py", MAZE | unrolled(last=8) | {"data.test_examples": 480}), 480)
    yield Case("480 mazes of side 13, a model of side 7, `Picard(1e-4, 150)`", *mazes, Picard(1e-4, 150), 16)
    yield Case("the same, `Anderson(1e-4, 150)`", *mazes, Anderson(1e-4, 150), 16)
    words = segments(trained("configs/wt103.py:tiny", REGULARIZED | {"model.mem_len": 0, "train.steps": 300}), 480)
    yield Case("480 texts of 32 words, a DEQ-Transformer, `Anderson(1e-3, 30)`", *words, Anderson(1e-3, 30), 16)


def measure(case: Case, rounds: int) -> list[str]:
    """The row of a case."""
    import jax
    import jax.numpy as jnp

    from deq_flax import fixed_point, fixed_point_queue

    arrays, slots = (case.z0, case.inputs), case.slots
    problems = len(jax.tree.leaves(case.z0)[0])
    assert problems % slots == 0

    @jax.jit
    def queue(z0: Any, inputs: Any) -> Any:
        return fixed_point_queue(case.f, z0, *inputs, slots=slots, solver=case.solver)

    @jax.jit
    def batches(z0: Any, inputs: Any) -> Any:
        split = jax.tree.map(lambda a: a.reshape(-1, slots, *a.shape[1:]), (z0, inputs))
        return jax.lax.map(lambda one: fixed_point(case.f, one[0], *one[1], solver=case.solver), split)

    seconds: dict[Any, list[float]] = {queue: [], batches: []}
    for _ in range(rounds + 1):  # the first compiles
        for program, laps in seconds.items():
            start = process_time()
            jax.block_until_ready(program(*arrays))
            laps.append(process_time() - start)
    one, many = queue(*arrays), batches(*arrays)
    # Where an iteration is chaotic, rounding decides which problems converge, but not how many.
    assert abs(float(jnp.mean(one.stats.converged) - jnp.mean(many.stats.converged))) < 0.05
    took = {program: median(laps[1:]) for program, laps in seconds.items()}
    return [
        case.name,
        f"{float(jnp.mean(one.stats.converged)):.0%}",
        f"{float(many.stats.nfe.mean() / (1 + many.stats.steps.mean())):.2f}",
        f"{float(many.stats.nfe.sum() / one.stats.nfe):.2f}",
        f"{problems / took[batches]:,.0f}",
        f"{problems / took[queue]:,.0f}",
        f"{took[batches] / took[queue]:.2f}",
    ]


HEAD = ["problems", "converged", "largest / mean steps", "fewer evaluations", "a second, batches", "a second, queue", "faster"]


def main() -> None:
    parser = tables.parser(__doc__, rounds=5)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    rows = []
    for case in cases():
        rows.append(measure(case, arguments.rounds))
        print(*rows[-1], sep=" | ", flush=True)
    text = f"{turns.machine(['jax'])}, one of them used. Times are of the processor.\n\n{tables.markdown(HEAD, rows)}"
    tables.publish("serving", text, arguments.write)


if __name__ == "__main__":
    main()
