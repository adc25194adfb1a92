"""Laws of the phases: phase and scalars are functions of (seed, step); solvers and gradients come from the config by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import SHINE, Anderson, Broyden, Implicit, Neumann, PhantomGradient, Reversible, Unroll, fixed_point, options
from deq_flax.equilibrium import GRADIENTS, SOLVERS
from deq_flax.errors import UserError
from deq_flax.train.phases import DEQOptions, Phase, StepScalars, make_phases, solver_metrics

SECTION = dict(
    solver="anderson", max_steps=12, backward_tol=1e-4, backward_max_steps=13, jacobian_weight=1.9, jacobian_frequency=0.35,
    jacobian_increment_every=100, max_steps_jitter=2, pretrain_steps=50,
)  # fmt: skip


def phases(*, seed=0, **section):
    return make_phases(options.make(DEQOptions, SECTION | section, "deq"), seed=seed)


def training(**section):
    """The gradient of an equilibrium training step."""
    return phases(**section, pretrain_steps=0).phase(0).gradient


def test_pretraining_is_unrolled_and_without_jacobian_loss():
    p = phases()
    assert {str(p.phase(step)) for step in range(50)} == {"unrolled pretraining"}
    assert {str(p.phase(step)) for step in range(50, 500)} == {"equilibrium", "equilibrium with Jacobian loss"}
    assert p.phase(0).gradient == Unroll(2)
    assert isinstance(p.phase(50).gradient, Implicit) and p.phase(50).gradient == p.evaluation.gradient


def test_the_kinds_of_phases_are_those_that_steps_have():
    cases = [{}, {"jacobian_frequency": 1.0}, {"jacobian_frequency": 1.0, "jacobian_stop": 200}, {"pretrain_steps": 0}]
    for section in [*cases, {"pretrain_jacobian_weight": 1.0}, {"jacobian_weight": 0.0}]:
        p = phases(**section)
        assert set(p.kinds()) == {p.phase(step) for step in range(500)}
        assert p.kinds()[0].name == "equilibrium"


def test_every_solver_and_gradient_of_the_tables_can_be_named():
    for name in GRADIENTS:
        gradient = training(gradient=name, solver="broyden")
        assert isinstance(gradient, GRADIENTS[name])
    for name in SOLVERS:
        assert isinstance(training(backward_solver=name).solver, SOLVERS[name])
    assert training(gradient="shine", solver="broyden", gradient_options={"refine_steps": 2}) == SHINE(refine_steps=2)
    assert training(gradient="neumann", gradient_options={"terms": 4}) == Neumann(terms=4)
    assert training(gradient="reversible") == phases(gradient="reversible").evaluation.gradient == Reversible()


def test_options_of_one_solver_reach_it():
    p = phases(solver_options={"memory": 4, "relaxation": 0.5}, backward_solver_options={"memory": 5, "line_search": True})
    assert p.evaluation.solver == Anderson(tol=1e-3, max_steps=12, memory=4, relaxation=0.5)
    assert p.evaluation.gradient.solver == Broyden(tol=1e-4, max_steps=13, memory=5, line_search=True)
    assert phases().evaluation.solver == Anderson(tol=1e-3, max_steps=12)
    absolute = phases(stop="absolute")
    assert absolute.evaluation.solver.stop == "absolute" and absolute.evaluation.gradient.solver.stop == "relative"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(solver="andersen"), "unknown deq.solver 'andersen'; known: picard, anderson, broyden, gmres"),
        (dict(solver="gmres"), "linear equations only"),
        (dict(backward_solver="gmress"), "unknown deq.backward_solver"),
        (dict(gradient="ghost"), "unknown deq.gradient 'ghost'; known: implicit, "),
        (dict(solver_options={"memroy": 4}), "deq.solver_options has no key 'memroy'; did you mean 'memory'"),
        (dict(solver_options={"tol": 1.0}), "deq.solver_options has no key 'tol'"),
        (dict(solver_options={"memory": "many"}), "deq.solver_options.memory must be a whole number"),
        (dict(gradient="phantom", gradient_options={"relaxation": 1.5}), "relaxation"),
        (dict(gradient="shine"), "set deq.solver to broyden, not anderson"),
        (dict(gradient_options={"solver": 1}), "deq.gradient_options has no key 'solver'"),
        (dict(backward_solver_options={"stop": "absolute"}), "deq.backward_solver_options has no key 'stop'"),
        (dict(stop="rel"), "unknown deq.stop 'rel'; known: relative, absolute"),
        (dict(jacobian_frequency=2.0), "probability"),
        (dict(pretrain_layers=0), "steps"),
    ],
)
def test_wrong_names_and_options_are_one_line(section, message):
    with pytest.raises(UserError) as error:
        phases(**section)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_jacobian_loss_comes_with_its_frequency_and_stops():
    drawn = phases()
    share = np.mean([drawn.phase(step).jacobian_loss for step in range(50, 4050)])
    assert abs(share - 0.35) < 0.03
    stopping = phases(jacobian_stop=60, jacobian_frequency=1.0)
    assert all(stopping.phase(step).jacobian_loss for step in range(50, 60))
    assert not any(stopping.phase(step).jacobian_loss for step in range(60, 500))
    without = phases(jacobian_weight=0.0)
    assert not any(without.phase(step).jacobian_loss for step in range(50, 500))


def test_the_weight_grows_on_schedule():
    weights = [float(phases().scalars(step).jacobian_weight) for step in (0, 149, 150, 250)]
    np.testing.assert_allclose(weights, [1.9, 1.9, 2.0, 2.1], rtol=1e-6)
    np.testing.assert_allclose(phases(jacobian_increment_every=0).scalars(10_000).jacobian_weight, 1.9, rtol=1e-6)


def test_step_limits_are_drawn_from_the_published_range():
    drawn = phases()
    limits = [int(drawn.scalars(step).max_steps) for step in range(600)]
    assert set(limits) == {10, 11, 12}
    assert min(np.bincount(limits)[10:]) > 150
    assert {int(phases(max_steps_jitter=0).scalars(step).max_steps) for step in range(50)} == {12}


def test_a_step_is_decided_by_seed_and_number_alone():
    a, b = phases(), phases()
    forward = [(a.phase(s), a.scalars(s)) for s in range(200)]
    backward = [(b.phase(s), b.scalars(s)) for s in reversed(range(200))][::-1]
    assert forward == backward
    assert [phases(seed=1).phase(s) for s in range(200)] != [phase for phase, _ in forward]


def test_a_phantom_gradient_changes_neither_pretraining_nor_the_solver():
    p = phases(gradient="phantom", gradient_options={"steps": 3, "relaxation": 0.7})
    assert p.phase(50).gradient == PhantomGradient(steps=3, relaxation=0.7) and p.phase(0).gradient == Unroll(2)
    assert p.phase(50).solver == phases().phase(50).solver


def test_a_jacobian_loss_in_pretraining_has_a_weight_of_its_own():
    p = phases(pretrain_jacobian_weight=0.03, jacobian_frequency=1.0)
    assert {str(p.phase(step)) for step in range(50)} == {"unrolled pretraining with Jacobian loss"}
    np.testing.assert_allclose([p.scalars(step).jacobian_weight for step in (0, 49, 50)], [0.03, 0.03, 1.9], rtol=1e-6)


def test_unrolled_training_is_evaluated_by_solving():
    p = phases(gradient="unroll", pretrain_steps=0, max_steps_jitter=0)
    assert p.phase(0).gradient == Unroll(12, remat=True)
    assert isinstance(p.evaluation.gradient, Implicit)


@pytest.mark.slow
def test_a_truncated_iteration_is_drawn_evaluated_and_given_its_noise():
    options = {"last": 3, "noise": 0.5}
    p = phases(gradient="unroll", gradient_options=options, pretrain_steps=1, max_steps_jitter=8, eval_max_steps=40)
    assert p.phase(1).gradient == Unroll(12, last=3, remat=True, noise=0.5)
    f, z0 = (lambda z: 0.5 * z + 1), jnp.zeros((1, 2))
    key = jax.random.key(0)
    assert {p.phase(i).gradient for i in range(1, 60)} == {p.phase(1).gradient}, "one program for all numbers of steps"
    taken = jax.jit(lambda scalars: p.phase(1).solve(scalars, key=key)(f, z0)[0].stats.steps[0])
    steps = {float(taken(p.scalars(i))) for i in range(1, 60)}
    assert steps == set(range(4, 13)), "each step draws its number of applications"
    assert p.phase(0).solve(p.scalars(0), key=key)(f, z0)[0].stats.steps[0] == 2, "pretraining has its own number"
    noisy, other, quiet = (p.phase(1).solve(key=k)(f, z0)[0].value for k in (key, jax.random.key(1), None))
    np.testing.assert_allclose(quiet, 2 - 0.5**11)
    assert np.abs(noisy - quiet).min() > 0 and np.abs(noisy - other).min() > 0
    assert isinstance(p.evaluation.gradient, Implicit) and p.evaluation.solver.max_steps == 40
    unrolled = phases(gradient="unroll", gradient_options=options, eval_max_steps=40, eval_unrolled=True).evaluation
    assert unrolled.solve()(f, z0)[0].stats.steps[0] == 40
    assert unrolled.solve(StepScalars(max_steps=np.int32(7)))(f, z0)[0].stats.steps[0] == 7


def test_a_number_of_steps_that_is_never_drawn_is_one_of_the_program():
    p = phases(gradient="unroll", max_steps_jitter=0, pretrain_steps=1)
    assert not p.phase(0).limited and not p.phase(1).limited
    assert phases(gradient="unroll", max_steps_jitter=1, pretrain_steps=0).phase(0).limited
    assert phases(max_steps_jitter=0, pretrain_steps=0).phase(0).limited


@pytest.mark.parametrize("wrong", [{"gradient_options": {"key": 3}, "gradient": "unroll"}, {"eval_unrolled": True}])
def test_options_of_unrolling_are_checked(wrong):
    with pytest.raises(UserError, match=r"no key 'key'|deq.eval_unrolled is for"):
        phases(**wrong)


def test_a_model_without_an_equilibrium_has_one_phase_and_nothing_to_solve():
    p = make_phases(None)
    assert {p.phase(step) for step in range(9)} == {Phase("explicit layers")}
    assert p.phase(0).solve(p.scalars(0)) is None and p.evaluation.solve() is None


def test_the_solve_of_a_phase_is_that_of_the_library():
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    phase = phases(jacobian_frequency=1.0, pretrain_steps=0).phase(0)
    f = lambda z: jnp.tanh(0.3 * z + x)  # noqa: E731
    expected = jax.jit(lambda z: fixed_point(f, z, solver=phase.solver))(0 * x)
    solution, jacobian = jax.jit(lambda z: phase.solve(key=jax.random.key(0))(f, z))(0 * x)
    np.testing.assert_array_equal(solution.value, expected.value)
    slope = 0.3 * (1 - jnp.square(expected.value))  # f works element by element
    v = jax.random.normal(jax.random.split(jax.random.split(jax.random.fold_in(jax.random.key(0), 1), 1)[0], 1)[0], x.shape)
    np.testing.assert_allclose(jacobian, jnp.square(v * slope).sum() / x.size, rtol=1e-3)
    assert phase.solve()(f, 0 * x)[1] is None  # no key, no Jacobian loss


def test_samples_that_are_not_solved_are_counted():
    slope_B1 = jnp.array([[0.5], [3.0], [jnp.nan], [0.1]])
    solution = fixed_point(lambda z: slope_B1 * z + 1, jnp.zeros((4, 1)), solver=Anderson(memory=1, max_steps=20))
    share = solver_metrics(solution.stats, None)["forward_unsolved"]
    assert float(share.total) / float(share.count) == 0.5
    assert "jacobian_loss" not in solver_metrics(solution.stats, None) and solver_metrics(None, None) == {}
