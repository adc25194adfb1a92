"""Public names: tables and lists of exports are complete."""

import dataclasses
import inspect

import jax
import pytest

import deq_flax
from deq_flax import equilibrium
from deq_flax.equilibrium import GRADIENTS, SOLVERS, LinearSolver, Solver, fixed_point, gradients


def exported(kind):
    """Return the exported classes of a kind, without base classes and protocols."""
    classes = [value for value in vars(equilibrium).values() if inspect.isclass(value)]
    return {c for c in classes if kind(c) and c is not Solver and not getattr(c, "_is_protocol", False)}


def test_the_table_of_solvers_holds_every_exported_solver():
    assert set(SOLVERS.values()) >= exported(lambda c: hasattr(c, "solve_linear"))
    assert len(SOLVERS) == len(set(SOLVERS.values()))


def test_the_table_of_gradients_holds_every_exported_gradient():
    assert set(GRADIENTS.values()) >= exported(lambda c: c.__module__.startswith("deq_flax.equilibrium.gradients."))
    assert len(GRADIENTS) == len(set(GRADIENTS.values()))
    assert all(f"| `{cls.__name__}` |" in (gradients.__doc__ or "") for cls in GRADIENTS.values())


@pytest.mark.parametrize("cls", [*SOLVERS.values(), *GRADIENTS.values()], ids=lambda c: c.__name__)
def test_options_are_the_fields_of_a_frozen_hashable_dataclass(cls):
    """So that a config can name them, and an object can be a static argument of `jax.jit`."""
    required = {f.name: 2 for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    one, same = cls(**required), cls(**required)
    assert one == same and hash(one) == hash(same) and set(inspect.signature(cls).parameters) == set(vars(one))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.anything = 1
    assert isinstance(one, LinearSolver) == (cls in SOLVERS.values())


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_gradient_of_the_table_solves_and_differentiates(name):
    gradient = GRADIENTS[name](**({"steps": 40} if name == "unroll" else {}))
    f = lambda x: fixed_point(lambda z: 0.5 * z + x, 0 * x, gradient=gradient).value.sum()  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(f))(jax.numpy.ones((1, 1)))
    assert abs(value - 2) < 1e-3 and 0 < slope < 2.1


def test_lists_of_exports_are_complete():
    for package in (deq_flax, equilibrium):
        public = {name for name, value in vars(package).items() if not name.startswith("_") and not inspect.ismodule(value)}
        assert set(package.__all__) - {"__version__"} == public
