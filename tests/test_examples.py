"""The examples of docs/examples learn what they say, and are short."""

import importlib.util

import jax
import pytest

from tests.commands import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def rank_promotion():
    """Examples are written for users, whose JAX promotes ranks; the suite's setting refuses it."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
def test_digits():
    assert example("digits_nnx").main(steps=80) > 0.8


@pytest.mark.slow
def test_inverse_problem():
    k, a = example("inverse_problem").main()
    assert abs(k - 10) < 0.1 and abs(a - 20) < 0.1  # noise of 1e-3 moves them by 0.04


@pytest.mark.slow
def test_graph_network():
    assert example("graph_network").main(steps=30) > 0.95


@pytest.mark.slow
def test_scan():
    module = example("scan")
    assert abs(module.main(steps=30) - 5) < 1  # from 2


@pytest.mark.slow
def test_sharded():
    loss, evaluations = example("sharded").main(steps=60)
    assert loss < 0.1 and len(evaluations) == 4


def test_examples_are_short_and_each_is_tested():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.stem for file in files] == ["digits_nnx", "graph_network", "inverse_problem", "scan", "sharded"]
    for file in files:
        assert len(file.read_text().splitlines()) <= 80, file
