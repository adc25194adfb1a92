"""Laws of sharded runs: many devices give the result of one, store a part each, and send nothing while a solver iterates."""

import jax
import numpy as np
import pytest

from deq_flax.checkpoints.checkpoints import Checkpoints
from deq_flax.checkpoints.retry import RetryingSaver
from deq_flax.devices.collectives import collectives, table
from tests.tasks import images
from tests.train import small
from tests.train.small import config, write_tokens

pytestmark = pytest.mark.slow

MESHES = {
    "one": dict(data=1, fsdp=1, tensor=1),
    "data2 fsdp2 tensor2": dict(data=2, fsdp=2, tensor=2),
    "data8": dict(data=8, fsdp=1, tensor=1),
    "fsdp8": dict(data=1, fsdp=8, tensor=1),
    "tensor4": dict(data=1, fsdp=1, tensor=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def make_run(config, mesh):
    """A run before its first step."""
    return small.make_run(config | {"mesh": mesh})


PROPOSAL = {"name": "proposal_deq", "proposal_blocks": 1, "pre_norm": True, "affine_norm": True, "gated": True}


def start(folder, mesh, **changes):
    """A run before its first step, with nothing random and plain gradient descent: an update is the gradient."""
    c = config(
        folder,
        data={"batch_size": 8, "seq_len": 4, "eval_batch_size": 8},
        model={"dropout": 0.0, "attention_dropout": 0.0, "n_head": 4, "d_head": 4} | changes.get("model", {}),
        deq={
            "jacobian_weight": 0.0,
            "max_steps_jitter": 0,
            "pretrain_steps": 0,
            "solver": "picard",  # the others amplify rounding where they end at their limit, as with an untrained model
            "backward_solver": "picard",
        }
        | changes.get("deq", {}),
        optimizer={"name": "sgd", "learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
        | changes.get("optimizer", {}),
        train={"ema_decay": 0.0},
    )
    return make_run(c, mesh)


def compiled_step(run):
    batch = jax.device_put(next(run.task.train_batches(0)))
    arguments = (run.state, batch, run.phases.scalars(0), np.int32(0))
    return run.train_step.lower(*arguments, phase=run.phases.phase(0)).compile(), arguments


@pytest.fixture(scope="module")
def steps(folder):
    """Name of a mesh -> (HLO, loss, gradient norm, parameters after minus before), computed once each."""
    done = {}

    def get(name):
        if name not in done:
            run = start(folder, MESHES[name])
            step, arguments = compiled_step(run)
            before = jax.tree.map(np.asarray, run.state.params)
            state, metrics = step(*arguments)
            change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before)
            loss, norm = (float(metrics[name].total) / float(metrics[name].count) for name in ("loss", "grad_norm"))
            done[name] = step.as_text(), loss, norm, change
        return done[name]

    return get


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_losses_and_gradients_are_those_of_one_device(steps, name):
    _, loss, norm, change = steps("one")
    _, other_loss, other_norm, other_change = steps(name)
    np.testing.assert_allclose([other_loss, other_norm], [loss, norm], rtol=2e-6)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(change))
    assert scale > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale), other_change, change)


def test_a_step_on_images_is_that_of_one_device(tmp_path):
    """Batch normalization is over the whole batch, and no collective is within a loop."""
    deq = {"solver": "picard", "backward_solver": "picard", "pretrain_steps": 0, "jacobian_weight": 0.0, "max_steps_jitter": 0}
    sgd = {"learning_rate": 1.0, "schedule": "constant", "clip_norm": 0.0, "momentum": 0.0, "nesterov": False}
    data = {"batch_size": 8, "eval_batch_size": 8, "pictures": 0}
    c = images.classification(images.write_labeled(tmp_path), data=data, model={"dropout": 0.0}, deq=deq, optimizer=sgd)
    results = []
    for mesh in (dict(data=1, fsdp=1, tensor=1), dict(data=2, fsdp=2, tensor=1), dict(data=4, fsdp=1, tensor=1)):
        run = make_run(c, mesh)
        step, arguments = compiled_step(run)
        assert not any(collective.in_loop for collective in collectives(step.as_text()))
        before = jax.tree.map(np.asarray, run.state.params)
        state, metrics = step(*arguments)
        change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before)
        loss = float(metrics["loss"].total) / float(metrics["loss"].count)
        results.append((loss, change, jax.tree.map(np.asarray, state.variables)))
    (loss, change, variables), *others = results
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(change))
    assert scale > 1e-3 and jax.tree.leaves(variables)
    for other_loss, other_change, other_variables in others:
        np.testing.assert_allclose(other_loss, loss, rtol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale), other_change, change)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other_variables, variables)


def test_a_proposal_and_its_refinement_are_those_of_one_device(folder):
    """With a consistency loss, which rides along the solution and is reported."""
    results = []
    for name in ("one", "data2 fsdp2 tensor2"):
        run = start(folder, MESHES[name], model=PROPOSAL, deq={"consistency_weight": 1.0})
        step, arguments = compiled_step(run)
        assert {collective.kind for collective in collectives(step.as_text()) if collective.in_loop} <= {"all-reduce"}
        before = jax.tree.map(np.asarray, run.state.params)
        state, metrics = step(*arguments)
        change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before)
        losses = [float(metrics[name].total) / float(metrics[name].count) for name in ("loss", "consistency_loss")]
        results.append((losses, change))
    (loss, change), (other_loss, other_change) = results
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(change))
    assert scale > 1e-3 and loss[1] > 1e-3
    np.testing.assert_allclose(other_loss, loss, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * scale), other_change, change)


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_no_collective_is_within_a_loop(steps, name):
    found = collectives(steps(name)[0])
    assert found
    kinds = {collective.kind for collective in found if collective.in_loop}
    # A tensor axis needs a sum over the parts of each feed-forward, which the compiler places in the loop.
    assert kinds <= ({"all-reduce"} if "tensor" in name else set())


def test_communication_does_not_depend_on_the_iterations(folder):
    def sent(limit):
        deq = {"solver": "anderson", "backward_solver": "broyden", "max_steps": limit, "backward_max_steps": limit}
        step, _ = compiled_step(start(folder, dict(data=2, fsdp=4, tensor=1), deq=deq))
        found = collectives(step.as_text())
        assert not any(collective.in_loop for collective in found)
        return table(found)

    few = sent(4)
    assert few == sent(16)
    assert few["all-gather"][0] > 0 and few["reduce-scatter"][0] > 0
    # Parameters are gathered and their gradients scattered once, all of them in float32.
    assert few["all-gather"][1] == few["reduce-scatter"][1]


def test_each_device_stores_a_part(folder):
    state = start(folder, MESHES["fsdp8"], optimizer={"name": "adam"}).state
    leaves = jax.tree.leaves((state.params, state.opt_state))
    divided = [x for x in leaves if any(size % 8 == 0 for size in x.shape)]
    assert sum(x.nbytes for x in divided) > 0.97 * sum(x.nbytes for x in leaves)
    for x in leaves:
        assert x.addressable_shards[3].data.nbytes == (x.nbytes // 8 if any(x is y for y in divided) else x.nbytes)


def test_a_run_resumes_on_another_mesh(folder, tmp_path):
    c = config(folder, data={"batch_size": 8, "eval_batch_size": 8})
    saved = make_run(c, dict(data=1, fsdp=4, tensor=1))
    saved.state = jax.tree.map(lambda x: x + 1, saved.state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        RetryingSaver(checkpoints, {"config": c}).save_final(2, saved.state.checkpoint_trees(), None)
    restored = [jax.tree.map(np.asarray, saved.state)]
    for mesh in (dict(data=2, fsdp=1, tensor=1), dict(data=1, fsdp=2, tensor=2)):
        run = make_run(c, mesh)
        before = jax.tree.map(lambda x: x.sharding, run.state)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            assert run.restore(checkpoints, "") == 2
        assert jax.tree.map(lambda x: x.sharding, run.state) == before
        restored.append(jax.tree.map(np.asarray, run.state))
    for other in restored[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, restored[0])
