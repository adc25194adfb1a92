"""The language task: every token is scored once, and memory is carried from segment to segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.config import phases_of, resolve
from deq_flax.devices.mesh import MeshOptions, make_mesh
from deq_flax.equilibrium import Anderson, Implicit
from deq_flax.errors import UserError
from deq_flax.train.evaluate import evaluate
from deq_flax.train.phases import Phase, StepScalars, regularized
from deq_flax.train.step import make_eval_step, split_model
from tests.train.small import config, evaluation_of, explicit, make_task, solve_of, write_tokens


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return config(write_tokens(tmp_path_factory.mktemp("tokens")), deq={"max_steps": 30, "tol": 1e-5})


@pytest.fixture(scope="module")
def task(settings):
    return make_task(settings)


@pytest.fixture(scope="module")
def model(task):
    return task.build_model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def loss(settings, task, model):
    return jax.jit(lambda batch, carry: task.loss(model, batch, carry, solve=solve_of(settings)))


def test_every_token_of_a_split_is_scored_once(settings, task, model, loss):
    """The reported loss is the mean over all targets, whatever the padding of the last segment."""
    reported = evaluate(*evaluation_of(settings, task, model), "valid")
    carry, total, count = task.fresh_carry(model, 4), 0.0, 0
    batches = task.eval_batches("valid")
    for i in range(len(batches)):
        mean, output = loss(batches[i], carry)
        carry, n = output.carry, batches[i]["mask"].sum()
        total, count = total + float(mean) * n, count + n
    assert count == len(task.corpus.valid) - 1
    # Solves of an untrained model end at their limit, which amplifies rounding.
    np.testing.assert_allclose(reported["loss"], total / count, rtol=1e-4)
    np.testing.assert_allclose(reported["ppl"], np.exp(reported["loss"]), rtol=1e-6)


@pytest.mark.slow
def test_zero_evaluations_of_a_proposal_model_are_its_explicit_blocks(settings):
    """The first row of `eval.max_steps_sweep`."""
    own = {"name": "proposal_deq", "proposal_blocks": 1, "pre_norm": True}
    c = settings | {"model": settings["model"] | own}
    task, phase = make_task(c), phases_of(resolve(c)).evaluation.at_start()
    model = task.build_model(nnx.Rngs(0))
    alone = explicit(c)
    alone["model"] = {key: value for key, value in alone["model"].items() if key != "proposal_blocks"} | {"blocks": 1}
    other = make_task(alone).build_model(nnx.Rngs(1))
    other.cells, other.embedding, other.softmax = nnx.List(list(model.cells)[:1]), model.embedding, model.softmax
    mesh, (graphdef, params, variables) = make_mesh(MeshOptions(data=1)), split_model(model)
    step = make_eval_step(task, graphdef, mesh, phase)
    found = evaluate(task, model, step, mesh, params, variables, "valid", max_steps=0)
    expected = evaluate(*evaluation_of(alone, make_task(alone), other), "valid")
    solved = evaluate(*evaluation_of(c, task, model), "valid")
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    assert found["forward_nfe"] == 1 < solved["forward_nfe"] and found["forward_residual"] > 0
    assert abs(solved["loss"] - found["loss"]) > 1e-4


def test_bits_per_byte_of_words_count_them_with_their_separators(settings, tmp_path):
    """As those of subwords do, so that both compare."""
    text = "the cat sat\n\non a é mat\n" * 9
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    data = {"name": "ptb", "path": str(tmp_path), "cache": str(tmp_path / "cache"), "batch_size": 2, "seq_len": 4}
    words = make_task(settings | {"data": settings["data"] | data})
    bits = words.summary("valid", {"loss": 2.0})["bits_per_byte"]
    np.testing.assert_allclose(bits, 2.0 / np.log(2) * len(words.corpus.valid) / len(text.encode()))
    assert "bits_per_byte" not in words.summary("train", {"loss": 2.0})


def test_a_fresh_batch_forgets_the_memory(task, model, loss):
    first, second = next(task.train_batches(0)), next(task.train_batches(1))
    _, output = loss(first, task.fresh_carry(model, 4))
    with_memory = loss(second, output.carry)[0]
    forgotten = loss(second | {"fresh": np.ones(4, bool)}, output.carry)[0]
    never_had = loss(second, task.fresh_carry(model, 4))[0]
    assert abs(float(with_memory - never_had)) > 1e-6
    np.testing.assert_allclose(forgotten, never_had, rtol=1e-6)


def test_masked_targets_count_for_nothing(task, model, loss):
    batch = next(task.train_batches(0))
    mask = np.array(batch["mask"])
    mask[:, 5:] = 0
    changed = np.where(mask == 0, (batch["targets"] + 1) % 40, batch["targets"])
    carry = task.fresh_carry(model, 4)
    a = loss(batch | {"mask": mask}, carry)[1].metrics["loss"]
    b = loss(batch | {"mask": mask, "targets": changed}, carry)[1].metrics["loss"]
    np.testing.assert_allclose(a.total, b.total)
    assert a.count == 20


def test_the_jacobian_loss_is_weighted_and_reported_apart(task, model):
    batch, carry = next(task.train_batches(0)), task.fresh_carry(model, 4)
    phase = Phase("", Anderson(tol=1e-5, max_steps=30), Implicit(), jacobian_loss=True)

    @jax.jit
    def value(weight):
        scalars, key = StepScalars(max_steps=jnp.int32(30), jacobian_weight=weight), jax.random.key(0)
        loss, output = task.loss(model, batch, carry, solve=phase.solve(scalars, key=key), key=key)
        return regularized(loss, output.jacobian_loss, scalars), output.metrics, output.jacobian_loss

    (zero, metrics, jacobian), (three, *_) = value(0.0), value(3.0)
    np.testing.assert_allclose(three - zero, 3 * jacobian, rtol=1e-4)
    np.testing.assert_allclose(zero, metrics["loss"].total / metrics["loss"].count, rtol=1e-6)
    assert jacobian > 0


def test_a_key_and_nothing_else_draws_dropout(settings, task, model, loss):
    batch, carry = next(task.train_batches(0)), task.fresh_carry(model, 4)
    solve = solve_of(settings)
    noisy = jax.jit(lambda key: task.loss(model, batch, carry, solve=solve, key=key)[0])
    first, second = noisy(jax.random.key(0)), noisy(jax.random.key(1))
    silent = loss(batch, carry)[0]
    assert len({float(first), float(second), float(silent)}) == 3
    assert noisy(jax.random.key(0)) == first


def test_an_impossible_model_is_refused_in_one_line(tmp_path):
    c = config(write_tokens(tmp_path), model={"d_inner": 0})
    with pytest.raises(UserError, match="section model"):
        make_task(c)
