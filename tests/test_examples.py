"""The examples of docs/examples learn and print what their page says, and are short."""

import importlib.util
import re

import jax
import pytest

from tests.commands import ROOT
from tests.test_docs import NUMBER

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


def ran(name, capsys):
    """The result of an example, whose output has the words that the page shows, and the numbers of the page's last line."""
    page = (ROOT / "docs" / "examples.md").read_text()
    shown = re.search(rf"^```text\n([^`]*)```\n\n``` {{ .python }}\n--8<-- \"docs/examples/{name}.py\"$", page, re.MULTILINE)[1]
    result = example(name).main()
    printed = capsys.readouterr().out
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, shown)]
    assert words[0] == words[1]
    return result, [float(x) for x in NUMBER.findall(shown.splitlines()[-1])]


# Numbers of the way to a result depend on rounding, and so on the machine: laws are of the result.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_nnx", "digits_jax"])
def test_digits(name, capsys):
    accuracy, shown = ran(name, capsys)
    assert abs(accuracy - shown[0]) < 0.03 and shown[0] > 0.9


@pytest.mark.slow
def test_inverse_problem(capsys):
    (k, a), shown = ran("inverse_problem", capsys)
    assert abs(k - shown[0]) < 0.1 and abs(a - shown[1]) < 0.1  # noise of 1e-3 moves them by 0.04


@pytest.mark.slow
def test_graph_network(capsys):
    accuracy, (_, _, shown, _) = ran("graph_network", capsys)
    assert accuracy > 0.99 and shown > 0.99


@pytest.mark.slow
def test_scan(capsys):
    mu, (_, shown, _) = ran("scan", capsys)
    assert abs(mu - 5) < 0.2 and abs(mu - shown) < 0.1


@pytest.mark.slow
def test_sharded(capsys):
    (loss, evaluations), (_, shown, *shown_evaluations) = ran("sharded", capsys)
    assert loss < 2 * shown < 0.002 and len(evaluations) == 4
    assert max(abs(ours - theirs) for ours, theirs in zip(evaluations, shown_evaluations, strict=True)) <= 2


def test_examples_are_short_and_each_is_tested():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.stem for file in files] == ["digits_jax", "digits_nnx", "graph_network", "inverse_problem", "scan", "sharded"]
    for file in files:
        assert len(file.read_text().splitlines()) < 80, file
