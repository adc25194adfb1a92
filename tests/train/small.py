"""A language task small enough to train in a test, with every option that could break resuming: dropout, jitter, phases.

Also the helpers of all tests of runs: tasks and runs from a nested mapping, changed batches, arrays to compare.
"""

import contextlib
import dataclasses
from unittest import mock

import numpy as np

from deq_flax.checkpoints.checkpoints import CheckpointOptions
from deq_flax.checkpoints.stored_step import read_record
from deq_flax.config import Config, phases_of, resolve, to_dict
from deq_flax.config import make_task as task_of
from deq_flax.devices.mesh import MeshOptions, make_mesh
from deq_flax.train import loop
from deq_flax.train.loop import Run, train
from deq_flax.train.step import make_eval_step, split_model


def config(folder, **overrides):
    """A config as a nested mapping; overrides by section name: `train={'steps': 3}`."""
    sections = {
        "task": "language",
        "data": dict(name="tokens", path=str(folder), cache="", batch_size=4, seq_len=8, eval_batch_size=4, eval_seq_len=8),
        "model": dict(
            name="deq_transformer", vocab_size=40, d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=32, cutoffs=(10,),
            div_value=2, pre_norm=False, weight_norm=True, mem_len=8, local_size=0, dropout=0.1, attention_dropout=0.1,
            output_dropout="tokens", dtype="float32",
        ),
        "deq": dict(
            solver="anderson", tol=1e-3, max_steps=8, stop="relative", backward_solver="broyden", backward_tol=1e-3,
            backward_max_steps=8, jacobian_weight=0.5, jacobian_frequency=0.5, jacobian_increment=0.1,
            jacobian_increment_every=2, jacobian_stop=0, jacobian_through_equilibrium=False, max_steps_jitter=2,
            pretrain_steps=3, pretrain_layers=2,
        ),
        "optimizer": dict(
            name="adam", learning_rate=5e-3, warmup_steps=2, schedule="cosine", clip_norm=0.25, weight_decay=0.0,
            momentum=0.0, nesterov=False,
        ),
        "train": dict(
            steps=8, seed=0, log_every=1, eval_every=4, checkpoint_every=2, accumulate=1, ema_decay=0.9, max_skipped=3
        ),
        "mesh": dict(data=1, fsdp=1, tensor=1),
        "checkpoint": dict(keep_latest=2, keep_best=1, init_from=""),
    }  # fmt: skip
    return {name: section | overrides.get(name, {}) if name != "task" else section for name, section in sections.items()}


def write_tokens(folder, seed=0):
    """Write splits of repeated phrases of ids below 40, which a model can learn."""
    random = np.random.default_rng(seed)
    phrases = [random.integers(0, 40, 6) for _ in range(8)]
    for split, count in {"train": 60, "valid": 12, "test": 12}.items():
        tokens = np.concatenate([phrases[i] for i in random.integers(0, 8, count)])
        np.save(folder / f"{split}.npy", tokens.astype(np.int32))
    return folder


def make_task(config):
    """The task of a nested mapping."""
    return task_of(resolve(config))


def make_run(config, task=None):
    """The model, state and compiled steps of a nested mapping, at its first step."""
    c = resolve(config)
    return Run(task or task_of(c), phases_of(c), c.train, make_mesh(c.mesh), c.optimizer)


def solve_of(config):
    """The argument `solve` of evaluation."""
    return phases_of(resolve(config)).evaluation.solve()


def evaluation_of(config, task, model, *, slots=0):
    """The first arguments of `evaluate` and `measure`, on one device."""
    mesh = make_mesh(MeshOptions(data=1))
    graphdef, params, variables = split_model(model)
    phase = dataclasses.replace(phases_of(resolve(config)).evaluation, slots=slots)
    step = make_eval_step(task, graphdef, mesh, phase)
    return task, model, step, mesh, params, variables


def run(config, workdir, wrap=lambda task: task, *, own_steps=False):
    """Train as the command does; `wrap` may replace the task that the trainer sees.

    Runs of configs that differ only in when they log, evaluate and save share their steps: to trace one takes longer than to
    train with it. `own_steps`: make them anew, as a process does that resumes a run.
    """
    c = config if isinstance(config, Config) else resolve(config)
    with contextlib.nullcontext() if own_steps else shared_steps(c):
        return train(
            wrap(task_of(c)),
            workdir=workdir,
            config=to_dict(c),
            phases=phases_of(c),
            optimizer=c.optimizer,
            train=c.train,
            mesh=c.mesh,
            checkpoint=c.checkpoint,
        )


_STEPS = {}


def shared_steps(c):
    """Let the trainer take the steps of an earlier run in this process, if all that they depend on was the same."""
    train_options = {f"{name}_every": 1 for name in ("log", "eval", "checkpoint")}
    alike = dataclasses.replace(c, train=dataclasses.replace(c.train, **train_options), checkpoint=CheckpointOptions())

    def once(make):
        def made(*arguments, **options):
            key = make.__name__, repr(alike)
            if key not in _STEPS:
                _STEPS[key] = make(*arguments, **options)
            return _STEPS[key]

        return made

    return mock.patch.multiple(loop, make_train_step=once(loop.make_train_step), make_eval_step=once(loop.make_eval_step))


def explicit(config):
    """The same config with explicit layers instead of an equilibrium."""
    sections = {name: section for name, section in config.items() if name != "deq"}
    return sections | {"model": config["model"] | {"name": "transformer_xl", "blocks": 2}}


class ChangedBatches:
    """A task whose batches pass through `change(step, batch)`."""

    def __init__(self, task, change):
        self._task, self._change = task, change

    def __getattr__(self, name):
        return getattr(self._task, name)

    def train_batches(self, step, rows=None):
        for number, batch in enumerate(self._task.train_batches(step, rows), step):
            yield self._change(number, batch)


def arrays(workdir, step):
    """Every array of a checkpoint by name, as its checksum."""
    return read_record(workdir / "checkpoints" / str(step))["arrays"]
