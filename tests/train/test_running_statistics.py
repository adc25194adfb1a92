"""Running statistics of batch normalization: written once by every update that counts, by nothing else, and checkpointed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from deq_flax.checkpoints.checkpoints import Checkpoints
from deq_flax.checkpoints.loading import load_params
from deq_flax.config import resolve
from deq_flax.devices.mesh import BATCH, MeshOptions, make_mesh
from deq_flax.nn.normalization import BatchNorm
from deq_flax.task import LossOutput, average
from deq_flax.train.evaluate import EvalOptions, evaluate_checkpoint
from deq_flax.train.loop import train
from deq_flax.train.phases import make_phases
from deq_flax.train.step import split_model
from tests.train import small

MOMENTUM = 0.5


class Normalized(nnx.Module):
    def __init__(self):
        self.norm = BatchNorm(2, momentum=MOMENTUM)

    def __call__(self, x, train):
        return self.norm(x, train)


class Task:
    """A task that brings normalized numbers to 1. `spoil`: the steps whose batch is not finite."""

    batch_size = eval_batch_size = 8

    def __init__(self, spoil=()):
        self.spoil = spoil

    def build_model(self, rngs):
        return Normalized()

    def batch(self, step):
        x = np.random.default_rng(step).normal(2.0, 3.0, (8, 1, 1, 2)).astype(np.float32)
        return {"x": x * np.nan if step in self.spoil else x}

    def train_batches(self, step, rows=None):
        while True:
            yield self.batch(step)
            step += 1

    def eval_batches(self, split, rows=None):
        return [self.batch(100), self.batch(101)]

    def fresh_carry(self, model, batch_size):
        return ()

    def loss(self, model, batch, carry, *, solve=None, key=None):
        errors = jnp.square(model(batch["x"], key is not None) - 1).mean((1, 2, 3))
        return errors.mean(), LossOutput((), {"loss": average(errors.sum(), errors.size)})

    def summary(self, split, metrics):
        return dict(metrics)

    def throughput(self, seconds_per_step):
        return {}


def run(workdir, task=None, *, steps=1, **overrides):
    """Train; returns (mean, variance) in the newest checkpoint."""
    options = dict(ema_decay=0.0, log_every=1, eval_every=1, checkpoint_every=1, steps=steps)
    sections = small.config(
        "",
        train=options | overrides.pop("train", {}),
        optimizer=dict(name="sgd", warmup_steps=0) | overrides.pop("optimizer", {}),
        **overrides,
    )
    c = resolve(sections)
    parts = dict(optimizer=c.optimizer, train=c.train, mesh=c.mesh, checkpoint=c.checkpoint)
    result = train(task or Task(), workdir=workdir, config=sections, phases=make_phases(None), **parts)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        params, variables = templates()
        return result, statistics(checkpoints.restore(steps, params=params, variables=variables))


def templates():
    """Parameters and variables."""
    return split_model(Normalized())[1:]


def statistics(restored):
    return restored.variables["norm"]["mean_C"], restored.variables["norm"]["variance_C"]


def updated(mean, variance, x):
    """The running statistics after `x`, computed by hand with the unbiased variance."""
    x = x.reshape(-1, 2).astype(np.float64)
    mean = (1 - MOMENTUM) * mean + MOMENTUM * x.mean(0)
    return mean, (1 - MOMENTUM) * variance + MOMENTUM * x.var(0, ddof=1)


START = np.zeros(2), np.ones(2)


def close(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_one_update_a_step(tmp_path):
    _, found = run(tmp_path, steps=2)
    close(found, updated(*updated(*START, Task().batch(0)["x"]), Task().batch(1)["x"]))


@pytest.mark.parametrize("mesh", [dict(data=2), dict(data=2, fsdp=2)])
def test_statistics_are_those_of_the_whole_batch_over_all_devices(tmp_path, mesh):
    _, found = run(tmp_path, mesh=mesh)
    close(found, updated(*START, Task().batch(0)["x"]))


def test_micro_batches_follow_one_another(tmp_path):
    _, found = run(tmp_path, train=dict(accumulate=2))
    first, second = np.split(Task().batch(0)["x"], 2)
    close(found, updated(*updated(*START, first), second))


def test_a_skipped_step_writes_nothing(tmp_path):
    _, found = run(tmp_path, Task(spoil=[0, 2]), steps=3)
    close(found, updated(*START, Task().batch(1)["x"]))


@pytest.mark.slow
def test_a_resumed_run_has_the_statistics_of_one_never_stopped(tmp_path):
    class Crash(Task):
        def batch(self, step):
            if step == 2:
                raise RuntimeError("crash")
            return super().batch(step)

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "a", Crash(), steps=4)
    resumed, whole = run(tmp_path / "a", steps=4)[1], run(tmp_path / "b", steps=4)[1]
    for x, y in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_checkpoint_is_evaluated_with_its_own_statistics(tmp_path):
    """In evaluation, and at the end of a run whose last step worsened them; `init_from` starts from them too."""

    class Worse(Task):
        def batch(self, step):
            return {"x": super().batch(step)["x"] + (50 if step == 2 else 0)}

    task = Worse()
    result, last = run(tmp_path / "a", task, steps=3, optimizer=dict(learning_rate=1.0), checkpoint=dict(keep_latest=3))
    params, variables = templates()
    best = load_params(tmp_path / "a", params, variables)
    evaluation = evaluate_checkpoint(
        task, tmp_path / "a", phases=make_phases(None), mesh=MeshOptions(data=1), options=EvalOptions(), seed=0
    )
    assert evaluation.step == best.step == result.step == 2
    assert evaluation.metrics["valid"]["loss"] == result.metrics["valid"]["loss"] == best.meta["metrics"]["loss"]

    x = np.concatenate([batch["x"] for batch in task.eval_batches("valid")])
    mean, variance, scale, bias = map(np.asarray, (*statistics(best), *(best.params["norm"][n] for n in ("scale_C", "bias_C"))))
    y = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
    np.testing.assert_allclose(evaluation.metrics["valid"]["loss"], np.square(y - 1).mean(), rtol=1e-5)

    _, started = run(tmp_path / "b", task, checkpoint=dict(init_from=str(tmp_path / "a" / "checkpoints" / "3")))
    close(started, updated(*map(np.asarray, last), task.batch(0)["x"]))


def test_one_exchange_gives_the_statistics_of_the_batch_on_all_devices():
    graphdef, state = nnx.split(BatchNorm(2))
    x = np.random.default_rng(0).normal(2.0, 3.0, (8, 2, 1, 2)).astype(np.float32)

    def normalized(x):
        return nnx.merge(graphdef, state, copy=True)(x, True)

    mesh = make_mesh(MeshOptions(data=2), jax.devices()[:2])
    sharded = jax.shard_map(normalized, mesh=mesh, in_specs=P(BATCH), out_specs=P(BATCH), check_vma=False)
    np.testing.assert_allclose(sharded(x), normalized(x), atol=1e-5)
    assert str(jax.make_jaxpr(sharded)(x)).count("= psum") == 1
