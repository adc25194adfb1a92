"""What happens at which step: phases and controls are functions of (seed, step)."""

import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import Anderson, Implicit, PhantomGradient, Reversible, Unroll, fixed_point
from deq_flax.errors import UserError
from deq_flax.task import Phase
from deq_flax.train.phases import EquilibriumRecipe, solver_metrics, without_what_did_not_happen


def recipe(**options):
    defaults = dict(
        solver="anderson", tol=1e-3, max_steps=12, stop="relative", backward_solver="broyden", backward_tol=1e-4,
        backward_max_steps=13, jacobian_weight=1.9, jacobian_frequency=0.35, jacobian_increment=0.1,
        jacobian_increment_every=100, jacobian_stop=0, jacobian_through_equilibrium=False, max_steps_jitter=2,
        pretrain_steps=50, pretrain_layers=2, seed=0,
    )  # fmt: skip
    return EquilibriumRecipe(**defaults | options)


def test_pretraining_is_unrolled_and_without_jacobian_loss():
    r = recipe()
    assert {r.phase(step) for step in range(50)} == {Phase(unrolled=True)}
    assert not any(r.phase(step).unrolled for step in range(50, 500))
    assert r.gradient_of(Phase(unrolled=True)) == Unroll(2)
    assert isinstance(r.gradient_of(Phase()), Implicit) and r.gradient_of(None) == r.gradient_of(Phase())


def test_solvers_remember_as_much_as_they_are_told():
    r = recipe(memory=4)
    assert r.forward_solver.memory == 4 and r.gradient_of(None).solver.memory == 4
    assert recipe().forward_solver == Anderson(tol=1e-3, max_steps=12) and recipe().gradient_of(None).solver.memory is None
    assert isinstance(recipe(memory=4, solver="picard", backward_solver="gmres").gradient_of(None), Implicit)
    with pytest.raises(UserError, match="Broyden: memory"):
        recipe(memory=1)


def test_a_reversible_iteration_is_both_trained_and_evaluated():
    r = recipe(gradient="reversible")
    assert r.gradient_of(Phase()) == r.gradient_of(None) == Reversible()
    assert r.gradient_of(Phase(unrolled=True)) == Unroll(2)


def test_the_jacobian_loss_comes_with_its_frequency_and_stops():
    share = np.mean([recipe().phase(step).jacobian_loss for step in range(50, 4050)])
    assert abs(share - 0.35) < 0.03
    stopping = recipe(jacobian_stop=60, jacobian_frequency=1.0)
    assert all(stopping.phase(step).jacobian_loss for step in range(50, 60))
    assert not any(stopping.phase(step).jacobian_loss for step in range(60, 500))
    assert not any(recipe(jacobian_weight=0.0).phase(step).jacobian_loss for step in range(50, 500))


def test_the_weight_grows_on_schedule():
    weights = [float(recipe().controls(step).jacobian_weight) for step in (0, 149, 150, 250)]
    np.testing.assert_allclose(weights, [1.9, 1.9, 2.0, 2.1], rtol=1e-6)
    np.testing.assert_allclose(recipe(jacobian_increment_every=0).controls(10_000).jacobian_weight, 1.9, rtol=1e-6)


def test_step_limits_are_drawn_from_the_published_range():
    limits = [int(recipe().controls(step).max_steps) for step in range(600)]
    assert set(limits) == {10, 11, 12}
    assert min(np.bincount(limits)[10:]) > 150
    assert {int(recipe(max_steps_jitter=0).controls(step).max_steps) for step in range(50)} == {12}


def test_a_step_is_decided_by_seed_and_number_alone():
    a, b = recipe(), recipe()
    forward = [(a.phase(s), a.controls(s)) for s in range(200)]
    backward = [(b.phase(s), b.controls(s)) for s in reversed(range(200))][::-1]
    assert forward == backward
    assert [recipe(seed=1).phase(s) for s in range(200)] != [phase for phase, _ in forward]


def test_a_phantom_gradient_leaves_pretraining_and_the_solve_alone():
    r = recipe(gradient="phantom", phantom_steps=3, phantom_damping=0.7)
    assert r.gradient_of(Phase()) == PhantomGradient(steps=3, damping=0.7) and r.gradient_of(Phase(unrolled=True)) == Unroll(2)
    assert r.forward_solver == recipe().forward_solver
    with pytest.raises(UserError, match="known: implicit, phantom"):
        recipe(gradient="ghost")
    with pytest.raises(UserError, match="damping"):
        recipe(gradient="phantom", phantom_damping=1.5)


def test_a_jacobian_loss_in_pretraining_has_a_weight_of_its_own():
    r = recipe(pretrain_jacobian_weight=0.03, jacobian_frequency=1.0)
    assert {r.phase(step) for step in range(50)} == {Phase(unrolled=True, jacobian_loss=True)}
    np.testing.assert_allclose([r.controls(step).jacobian_weight for step in (0, 49, 50)], [0.03, 0.03, 1.9], rtol=1e-6)


def test_unrolled_training_is_evaluated_by_solving():
    r = recipe(gradient="unroll", pretrain_steps=0, max_steps_jitter=0)
    assert r.gradient_of(r.phase(0)) == Unroll(12, remat=True)
    assert isinstance(r.gradient_of(None), Implicit)


def test_members_that_are_not_solved_are_counted():
    slope_B1 = jnp.array([[0.5], [3.0], [jnp.nan], [0.1]])
    solution = fixed_point(lambda z: slope_B1 * z + 1, jnp.zeros((4, 1)), solver=Anderson(memory=1, max_steps=20))
    share = solver_metrics(solution.stats)["forward_unsolved"]
    assert float(share.total) / float(share.count) == 0.5
    assert without_what_did_not_happen({"loss": 1.0, "forward_unsolved": 0.0}) == {"loss": 1.0}
    assert without_what_did_not_happen({"forward_unsolved": 0.5}) == {"forward_unsolved": 0.5}
