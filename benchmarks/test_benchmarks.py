"""The benchmarks can be run, and their tables have a place to go to."""

import dataclasses
import importlib
import re
from argparse import Namespace
from functools import reduce
from operator import getitem
from pathlib import Path

import jax
import pytest

from benchmarks import language, tables, training

ROOT = Path(__file__).parent.parent

MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith(("torch_", "test_")))


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


def test_every_table_has_its_place():
    published = {
        name
        for module in MODULES
        for name in re.findall(
            r'(?:tables\.publish|turns\.command)\(\s*"([^"]+)"', (ROOT / "benchmarks" / f"{module}.py").read_text()
        )
    }
    places = re.findall(r"<!-- begin (.+) -->", tables.README.read_text())
    assert len(places) == len(set(places))
    assert set(places) == published - {"utilization", "accelerators"}  # an accelerator's, and docs/accelerators.md


def test_a_table_replaces_the_one_before_and_nothing_else(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("above\n<!-- begin a -->\nold\n<!-- end a -->\nbelow\n")
    tables.publish("a", "new", str(file))
    tables.publish("b", "other", str(file))
    text = file.read_text()
    assert text.startswith("above\n<!-- begin a -->\nnew\n<!-- end a -->\nbelow\n")
    assert text.endswith("<!-- begin b -->\nother\n<!-- end b -->\n")
    tables.publish("a", "newer", str(file))
    assert file.read_text() == text.replace("new\n", "newer\n")


@pytest.mark.parametrize("ptb", [None, "PTB"])
@pytest.mark.parametrize("name", language.MODELS)
def test_a_language_model_is_measured_as_the_command_trains_it(name, ptb):
    """With options within options, such as the terms of a Neumann series, which the command takes as flags."""
    config, changes = language.chosen(language.MODELS[name], Namespace(steps=60, ptb=ptb, full=False))
    measured = dataclasses.asdict(training.resolved(config, changes))
    for path, value in changes.items():
        if path.split(".")[0] != "deq" or measured["deq"] is not None:
            assert reduce(getitem, path.split("."), measured) == value


@pytest.mark.slow
def test_a_run_of_made_up_text_evaluates_as_often_as_it_is_told(tmp_path):
    it = training.Training(training.resolved("configs/wt103.py", training.timing_text(str(tmp_path), 3)))
    _, metrics = it.run.train_step(it.run.state, *it.arguments, phase=it.phases.phase(0))
    assert metrics["forward_nfe"].total == 3 and metrics["backward_nfe"].total == 3
    assert_loops_keep_the_state(it)


@pytest.mark.slow
def test_the_timed_loops_are_those_of_the_model(tmp_path):
    changes = {"data.batch_size": 2, "data.eval_batch_size": 2} | training.images(str(tmp_path), 8) | training.exactly(3)
    assert_loops_keep_the_state(training.Training(training.resolved("configs/cifar10.py:tiny", changes)))


def assert_loops_keep_the_state(it):
    states, cotangents = (jax.eval_shape(loop, it.run.state.params, it.run.state.variables) for loop in it.loops())
    assert jax.tree.leaves(states) == jax.tree.leaves(cotangents)
