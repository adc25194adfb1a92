"""Laws of the consistency loss: what it is, which gradient it adds, and that solves get shorter by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax.equilibrium import Picard, Unroll
from deq_flax.errors import UserError
from deq_flax.train.consistency import consistency_loss, with_loss
from deq_flax.train.phases import DEQOptions, EquilibriumPhases, make_probes, probe_metrics
from tests.cases import others_slow
from tests.tasks.images import classification, merged, write_labeled
from tests.train.commands import metrics
from tests.train.small import config, run, write_tokens

SIZE = 3


def problem():
    """f(z) = tanh(w z) + x of a state of two arrays, which see each other."""
    random = np.random.default_rng(0)
    w = jnp.asarray(random.normal(scale=0.4, size=(2 * SIZE, 2 * SIZE)), jnp.float32)
    x = jnp.asarray(random.normal(size=(4, 2 * SIZE)), jnp.float32)

    def f(w, z):
        after = jnp.tanh(jnp.concatenate(z, axis=-1) @ w) + x
        return after[:, :SIZE], after[:, SIZE:]

    return w, f, (jnp.zeros((4, SIZE)), jnp.zeros((4, SIZE)))


def phase(**options):
    solver = dict(solver="picard", tol=1e-6, max_steps=60, backward_tol=1e-6, backward_max_steps=60)
    return EquilibriumPhases(DEQOptions(**solver | options), 0).phase(0)


def test_it_is_the_squared_distance_of_f_at_the_iterates_from_the_equilibrium():
    w, f, (first, second) = problem()
    iterates = tuple(jnp.stack([leaf, leaf + 1.0]) for leaf in (first, second))
    z = first + 2.0, second + 2.0

    @jax.jit
    def both(w):
        after = [jnp.concatenate(f(w, (first + k, second + k)), axis=-1) for k in (0.0, 1.0)]
        return consistency_loss(lambda z: f(w, z), iterates, z), jnp.stack(after)

    loss, after = both(w)
    by_hand = np.square(after - 2.0).sum(-1) / (4.0 * 2 * SIZE)
    np.testing.assert_allclose(loss, by_hand.mean(), rtol=1e-6)


def test_a_loss_that_rides_along_adds_its_gradient_and_no_value():
    def both(w, attached):
        z = jnp.sin(w)
        return jnp.sum(with_loss(z, jnp.sum(w**3), 0.7) ** 2) if attached else jnp.sum(z**2) + 0.7 * jnp.sum(w**3)

    w = jnp.arange(1.0, 4.0)
    value_and_grads = jax.jit(
        lambda w: (both(w, True), jnp.sum(jnp.sin(w) ** 2), *(jax.grad(both)(w, x) for x in (True, False)))
    )
    value, alone, found, expected = value_and_grads(w)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert value == alone


def test_a_probe_reports_the_losses_without_their_weight():
    """Those of all solves of a step, whatever the loss of the task is multiplied by."""
    w, f, z0 = problem()

    def solved(start, probes=None, **options):
        solve = phase(**options).solve(probes=probes or make_probes())
        return solve(lambda z: f(w, z), start)[0]

    def task(probes, weight):
        first, second = (solved(start, probes, consistency_weight=weight).value[0] for start in (z0, (z0[0] + 1, z0[1])))
        return 3.0 * jnp.sum(first) + jnp.sum(second)

    def own(start):
        solution = solved(start, consistency_weight=1.0)
        return consistency_loss(lambda z: f(w, z), solution.trajectory, solution.value)

    def both():
        return [jax.grad(task)(make_probes(), weight) for weight in (0.7, 0.0)], own(z0), own((z0[0] + 1, z0[1]))

    (report, without), first, second = jax.jit(both)()
    np.testing.assert_allclose(report.consistency, [first + second, 2.0], rtol=1e-6)
    assert first > 1e-3 and abs(first - second) > 1e-3
    assert probe_metrics(without)["consistency_loss"].count == 0 < probe_metrics(without)["backward_nfe"].count


@pytest.mark.parametrize("gradient", others_slow(["implicit", "unroll"], ["unroll"]))
def test_a_training_step_adds_its_gradient_with_the_given_weight(gradient):
    w, f, z0 = problem()
    solvers = {weight: phase(gradient=gradient, consistency_weight=weight).solve() for weight in (0.0, 0.7)}
    recorded = Picard(tol=1e-6, max_steps=60, trajectory_steps=(0, 1, 2, 4))

    def task(w, weight):
        return jnp.sum(jnp.square(solvers[weight](lambda z: f(w, z), z0)[0].value[0]))

    def own(w):
        z, iterates = z0, []
        for k in range(60):
            iterates += [z] if k in recorded.trajectory_steps else []
            z = f(w, z)
        return consistency_loss(lambda z: f(w, z), jax.tree.map(lambda *leaves: jnp.stack(leaves), *iterates), z)

    added = jax.jit(lambda w: jax.grad(task)(w, 0.7) - jax.grad(task)(w, 0.0))(w)
    expected = 0.7 * jax.jit(jax.grad(own))(w)
    np.testing.assert_allclose(added, expected, rtol=0, atol=2e-5 * float(jnp.abs(expected).max()) + 1e-5)
    assert jnp.abs(expected).max() > 1e-2


def test_evaluation_and_pretraining_have_none():
    phases = EquilibriumPhases(DEQOptions(consistency_weight=1.0, pretrain_steps=1), 0)
    assert [p.consistency_weight for p in (phases.phase(0), phases.phase(1), phases.evaluation)] == [0.0, 1.0, 0.0]
    assert [p.solver.trajectory_steps for p in (phases.phase(0), phases.phase(1))] == [(), (0, 1, 2, 4)]
    assert isinstance(phases.phase(0).gradient, Unroll)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(consistency_weight=-1.0), "deq.consistency_weight must not be negative"),
        (dict(consistency_weight=1.0, consistency_steps=(0, 40)), "deq.consistency_steps: .* below 30"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DEQOptions(**options)


MODELS = {
    "deq_transformer": {"pre_norm": True, "dropout": 0.0, "attention_dropout": 0.0},
    "proposal_deq": {"name": "proposal_deq", "proposal_blocks": 1, "pre_norm": True, "dropout": 0.0, "attention_dropout": 0.0},
    "mdeq": {"dropout": 0.0},
}
TRAINED = {
    "deq": dict(max_steps=8, max_steps_jitter=0, jacobian_weight=0.0, pretrain_steps=0),
    "train": dict(steps=20, log_every=1, eval_every=0, checkpoint_every=20),
    "optimizer": dict(name="adam", learning_rate=5e-3, warmup_steps=0, momentum=0.0, nesterov=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_trained_model_is_tuned_for_few_evaluations(tmp_path, capsys, name):
    """As a recipe does it: `checkpoint.init_from` with a weight of the consistency loss, which is logged, and falls."""
    (tmp_path / "data").mkdir()
    base = classification(write_labeled(tmp_path / "data")) if name == "mdeq" else config(write_tokens(tmp_path / "data"))
    base = merged(merged(base, TRAINED), {"model": MODELS[name]})

    def trained(folder, **changes):
        run(merged(base, changes), tmp_path / folder)
        return [line for line in metrics(tmp_path / folder) if line["split"] == "train"]

    source = trained("source")
    start = {"init_from": str(tmp_path / "source")}
    tuned = trained("tuned", deq={"consistency_weight": 10.0}, checkpoint=start)
    assert f"starting from the weights in {tmp_path / 'source'}" in capsys.readouterr().out
    assert tuned[0]["loss"] < source[0]["loss"] and not any("consistency_loss" in line for line in source)
    losses = [line["consistency_loss"] for line in tuned]
    assert len(losses) == 20 and min(losses) > 0 and np.isfinite(losses).all()
    if name != "mdeq":  # whose loss did not fall in so few steps
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
