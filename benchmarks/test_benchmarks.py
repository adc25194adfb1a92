"""The benchmarks can be run, and their tables have a place to go to."""

import dataclasses
import importlib
import json
import re
from argparse import Namespace
from functools import reduce
from operator import getitem
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import accelerators, few_steps, guesses, language, records, tables, training
from deq_flax.config import make_task
from deq_flax.equilibrium import Anderson
from deq_flax.models import generation as library
from deq_flax.nn.transformer import Memory

ROOT = Path(__file__).parent.parent

MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith(("torch_", "test_")))


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


def test_every_table_has_one_place():
    published = {
        name
        for module in MODULES
        for name in re.findall(
            r'(?:tables\.publish|turns\.command)\(\s*"([^"]+)"', (ROOT / "benchmarks" / f"{module}.py").read_text()
        )
    }
    pages = (tables.README, tables.LANGUAGE, tables.DOCS / "accelerators.md")
    places = [place for page in pages for place in re.findall(r"<!-- begin (.+) -->", page.read_text())]
    assert len(places) == len(set(places))
    assert set(places) == published - {"utilization"}  # an accelerator's


def test_the_table_of_accelerators_has_every_row():
    assert records.read(accelerators.RESULTS).keys() == {row.key for row in accelerators.rows()}


def test_a_variation_of_a_recipe_is_compiled_with_all_its_changes():
    (row,) = (row for row in accelerators.rows() if row.recipe == "cifar10:large" and row.variation)
    deq = training.resolved(row.recipe, row.changes()).deq
    assert deq.solver_options == deq.backward_solver_options == {"history_dtype": "bfloat16"}
    assert {f"--config.{change}" for change in row.variation} < set(row.command())


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


def arguments(folder, **changes):
    return Namespace(**{"steps": 60, "ptb": None, "full": False, "seeds": [0, 1], "workdir": folder} | changes)


def write_run(folder, steps, speeds, perplexity, nfe):
    """Write the metrics of a run that ends with `steps`, and of an evaluation since with other limits and a sweep."""
    lines = [
        {"step": steps * (i + 1) // len(speeds), "split": "train", "steps_per_second": speed, "forward_nfe": nfe}
        for i, speed in enumerate(speeds)
    ]
    lines.append({"step": steps, "split": "valid", "ppl": perplexity, "forward_nfe": nfe})
    since = {"step": steps, "mode": "eval", "ppl": 2 * perplexity, "forward_nfe": 40.0}
    lines += [since | {"split": split} for split in ("valid", "test")] + [since | {"split": "valid", "max_steps": 1}]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_language_model_is_the_mean_of_its_seeds_at_the_end_of_training(tmp_path, monkeypatch):
    """Whatever it was evaluated with since; the speed of its first lines, which warm up, does not count."""
    monkeypatch.setattr(language, "facts", lambda *_: (1, 1.0))
    for seed, speed, perplexity, nfe in ((0, 10.0, 100.0, 4.0), (1, 5.0, 200.0, 5.0)):
        write_run(tmp_path / f"proposal_60_{seed}", 60, [1.0, speed, speed], perplexity, nfe)
    result = language.measure("proposal", 0, arguments(tmp_path))
    assert result.ends == [100, 200] and result.evaluations == [4.5]
    assert [run.seconds for run in result.runs] == pytest.approx([0.1, 0.2])
    minutes, perplexity = language.curves(result.runs)
    assert perplexity == [[100], [200]] and minutes == pytest.approx([((20 + 4) + (20 + 8)) / 2 / 60])


def test_a_continued_language_model_starts_from_the_end_of_its_own_seed(tmp_path, monkeypatch):
    seen = {}

    def train(config, workdir, changes, processor_time):
        seen[workdir.name] = changes
        write_run(workdir, changes["train.steps"], [1.0], 100.0, 4.0)

    monkeypatch.setattr(language, "train", train)
    folder = language.trained("base_consistency", 0, 1, arguments(tmp_path, processor_time=False))
    assert list(seen) == ["base_60_1", "base_consistency_60_1"] and folder == tmp_path / "base_consistency_60_1"
    first, second = seen.values()
    assert "checkpoint.init_from" not in first and second["checkpoint.init_from"] == str(tmp_path / "base_60_1")
    assert (first["train.steps"], second["train.steps"], second["train.seed"]) == (60, 30, 1)
    assert (first.get("deq.consistency_weight", 0), second["deq.consistency_weight"]) == (0, 1)
    assert language.trained("base_consistency", 0, 1, arguments(tmp_path)) == folder and len(seen) == 2


@pytest.mark.parametrize("name", ["explicit", "base_longer"])
def test_few_steps_are_logged_and_evaluated_too(tmp_path, name):
    _, changes = language.chosen(language.MODELS[name], arguments(tmp_path, steps=2))
    assert changes["train.log_every"] == changes["train.eval_every"] == 1


def test_few_evaluations_are_those_of_the_end_of_training(tmp_path):
    for name in ("checkpoints/60", "checkpoints/500", "checkpoints/1000", "checkpoints/2000.unfinished"):
        (tmp_path / name).mkdir(parents=True)
    assert few_steps.last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "1000"


SMALL = {"model.d_model": 16, "model.d_embed": 16, "model.d_head": 4, "model.d_inner": 16}


@pytest.mark.slow
def test_plain_iteration_ends_where_the_solver_of_training_does():
    config = training.resolved("configs/wt103.py:tiny_proposal", SMALL)
    model = make_task(config).build_model(nnx.Rngs(0))
    (at_start, many), full = few_steps.anytime(config, model, [0, 60]), few_steps.solved(config, model)
    assert at_start.converged == 0 and full.converged == many.converged == 1
    assert 1 < full.evaluations < config.deq.max_steps
    assert full.perplexity == pytest.approx(many.perplexity, rel=1e-3)


def test_cold_starts_are_zero_where_warm_ones_are_remembered_states():
    """Within the context alone."""
    memory, injection_BLJ = Memory(jnp.ones((1, 4, 2)), jnp.ones((1, 4, 3)), jnp.array([4])), jnp.ones((1, 5, 3))
    assert (library.nearest_states(memory, injection_BLJ) == jnp.ones((1, 5, 2))).all()
    with few_steps.cold_starts():
        assert (library.nearest_states(memory, injection_BLJ) == jnp.zeros((1, 5, 2))).all()
    assert (library.nearest_states(memory, injection_BLJ) == 1).all()


def make_passes(variant, memory=8):
    """Passes of a small model, and the words of a prompt."""
    config = training.resolved(f"configs/wt103.py:{variant}", SMALL | {"model.dropout": 0.0})
    model = make_task(config).build_model(nnx.Rngs(0))
    model.embedding.tables_NE[0][...] *= 100  # no ties between words
    return guesses.Passes(model, solver=Anderson(tol=1e-6, max_steps=60), memory=memory), np.array([5, 3, 8], np.int32)


@pytest.mark.slow
def test_guesses_change_no_greedy_text():
    passes, prompt = make_passes("tiny_proposal")
    greedy, kept = passes.write(prompt, 12, 1, guesses.own)
    assert kept == 1
    for guess in (guesses.own, guesses.repeated):
        assert passes.write(prompt, 12, 4, guess)[0] == greedy
    assert passes.write(prompt, 12, 4, lambda text, _: greedy[len(text) - 3 :]) == (greedy, 4)
    assert guesses.repeated([4, 7, 4, 9, 4], []) == [9, 4] and guesses.repeated([1, 2], [3]) == [3]


@pytest.mark.slow
def test_a_pass_attends_as_far_back_as_a_generator_that_reads_its_words_one_by_one():
    passes, prompt = make_passes("tiny_proposal", memory=2)
    state = passes.generator.start([prompt])
    words, _ = passes.write(prompt, 4, 1, guesses.own)
    after, kept_B, _ = passes.read(state.memory, np.array([words], np.int32))
    assert kept_B == 4
    for word in words:
        assert state.token_B == word
        state = passes.generator.step(state)
    np.testing.assert_allclose(after.states_BNMD, state.memory.states_BNMD, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "tiny_proposal"])
def test_guesses_are_kept_up_to_the_first_wrong_one(variant):
    passes, prompt = make_passes(variant)
    memory = passes.generator.start([prompt]).memory
    read = lambda *words: passes.read(memory, np.array([words], np.int32))  # noqa: E731
    first = int(read(7, 0, 0, 0)[2][0, 0])
    second = int(read(7, first, 0, 0)[2][0, 1])
    for words, kept in (((7, first, 999 - second, 0), 2), ((7, 999 - first, second, 0), 1)):
        after, kept_B, _ = read(*words)
        assert kept_B == kept and after.length_B == memory.length_B + kept


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
