"""The runs of docs/reasoning.md: distinct, made once, and reported as they came out."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import reasoning, reasoning_report, records, tables, training
from deq_flax.errors import DivergedError, UserError


def test_the_runs_are_distinct_and_their_configs_are_valid():
    runs = list(reasoning.runs())
    assert len({run.stem for run in runs}) == len(runs)
    for run in {(run.group, run.name): run for run in runs}.values():
        training.resolved(run.config, run.everything())
        for changes in run.evaluations.values():
            training.resolved(run.config, run.everything() | changes)


def test_results_of_another_program_are_named():
    """A seed, a model and its data change a run and all that starts from it; the time of a checkpoint does not."""
    tiny = {"data.size": 16, "data.test_sizes": (32,), "data.test_examples": 4, "model.width": 4, "data.train_examples": 100}
    run = reasoning.Run(
        "prefix sums", "10 steps", "configs/prefix_sums.py", reasoning.BITS | tiny, 0, {"more": {"data.test_examples": 5}}
    )
    same = replace(run, changes=run.changes | {"train.checkpoint_every": 7})
    records = {run.key(name): {"program": reasoning.program(run, name)} for name in ("", "more")}
    assert [*reasoning.changed(records, [same])] == []
    for change in ({"data.valid_examples": 99}, {"model.width": 5}, {"data.seed": 1}, {"deq.max_steps_jitter": 3}):
        other = replace(run, changes=run.changes | change)
        assert [*reasoning.changed(records, [other])] == [*records], change
    started = replace(run, name="started", start=run, evaluations={})
    kept = {started.key(): {"program": reasoning.program(started)}}
    assert [*reasoning.changed(kept, [started])] == [] == [*reasoning.changed(kept | records, [run, started])]
    assert reasoning.program(started, start=records[run.key()]["program"]) == kept[started.key()]["program"]
    assert reasoning.program(started, start="other weights") != kept[started.key()]["program"]
    before = replace(run, changes=run.changes | {"model.width": 5})
    assert [*reasoning.changed(kept, [replace(started, start=before)])] == [*kept]
    assert [*reasoning.changed({run.key("more"): {}}, [same])] == [run.key("more")]
    some_steps = replace(run, changes=run.changes | {"deq.jacobian_weight": 0.5, "deq.jacobian_frequency": 0.3})
    through = replace(some_steps, changes=some_steps.changes | {"deq.jacobian_through_equilibrium": True})
    assert reasoning.program(some_steps) != reasoning.program(through)


def test_every_table_has_its_place():
    text = (tables.DOCS / "reasoning.md").read_text()
    for name in reasoning_report.TABLES:
        assert text.count(f"<!-- begin {name} -->\n") == 1 and text.count(f"<!-- end {name} -->\n") == 1


def test_a_row_has_the_mean_and_the_extremes_of_its_seeds():
    of = lambda share: {"run": {"seed": int(10 * share)}, "metrics": {"test": {"exact_match": share, "residual": 1e-5}}}  # noqa: E731
    failed = {"run": {"seed": 9}, "failed": "not finite"}
    rows = {"a": [of(0.5), of(1.0)], "b": [of(0.9996)], "c": [failed]}
    lines = reasoning_report.gradients(rows, sizes=[""]).splitlines()
    assert lines[2].startswith("| a | 75.0% (50.0% to 100%) | 1e-05 | - |")
    assert lines[3].startswith("| b | 99.96% |") and lines[4].startswith("| c | - | - |")


def test_states_and_boards_have_a_row_for_every_model():
    """Results of two seeds, as `perform` writes them."""
    results = {}
    for run in reasoning.runs():
        if run.group in ("state tracking", "boards") and run.name in ("A5, 8 symbols", "6 x 6") and run.seed < 2:
            test = {"exact_match": 1.0, "exact_match_16": 0.5 + run.seed / 4, "steps": 9.0, "steps_16": 30.0}
            test |= {"cell_accuracy": 1.0, "converged": 1.0}
            results[run.stem] = {
                "run": {"config": run.config, "seed": run.seed},
                "parameters": 1234,
                "seconds": 600,
                "metrics": {"test": test},
            }
    lines = reasoning_report.states(results).splitlines()
    row = "| A5, 8 symbols | 1,234 | - | 100% | 62.5% (50.0% to 75.0%) | - | - | - | - | - | 9 | 30 | - | - | - | - |"
    assert lines[2] == row and lines[-1].startswith("Seeds 0, 1;")
    assert reasoning_report.boards(results).splitlines()[2] == "| 6 x 6 | 1,234 | 100% | 100% | 100% | 9 | - | - | 10 |"


def test_what_a_run_logged_last_in_training_is_in_its_row(tmp_path):
    """Segments of a halting model, residuals of both solves of an implicit gradient."""
    wanted = {"boards": "4 x 4, two levels", "gradients, mazes": "Implicit, Broyden"}
    (boards, mazes) = sorted((run for run in reasoning.runs() if wanted.get(run.group) == run.name and run.seed == 0), key=str)
    last = {"segments": 1.25, "forward_nfe": 24.9, "forward_residual": 1e-2, "backward_nfe": 20.2, "backward_residual": 1e-3}
    rows = [{"split": "train", name: 9.0} for name in last]
    rows += [{"split": "train"} | last, {"split": "valid", "segments": 16.0, "forward_residual": 1e-4}]
    rows = [{"step": 400} | row for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    test = {"exact_match": 0.5, "cell_accuracy": 1.0, "converged": 1.0, "steps": 48.0, "halted": 0.75}
    found = {"parameters": 1234, "seconds": 600, "metrics": {"test": test}, "last_steps": reasoning.last_steps(tmp_path)}
    results = {run.stem: {"run": asdict(run)} | found for run in (boards, mazes)}
    row = "| 4 x 4, two levels | 1,234 | 50.0% | 100% | 100% | 48 | 75.0% | 1.25 | 10 |"
    assert reasoning_report.boards(results).splitlines()[2] == row
    row = "| mazes | `Implicit, Broyden` | 25 | 1e-02 | 20 | 1e-03 | 50.0% |"
    assert reasoning_report.solves(results).splitlines()[2] == row


def test_long_strings_are_tested_in_parts():
    """Ten hundreds of seed 0 and one of each other seed, all of other strings; the cell has the spread of all twelve."""
    chosen = [run for run in reasoning.runs() if run.group == "prefix sums" and run.name == "10 to 30 steps"]
    parts = [run.key(name) for run in chosen for name in run.evaluations if name.startswith("long")]
    seeds = [changes["data.seed"] for run in chosen for name, changes in run.evaluations.items() if name.startswith("long")]
    assert seeds == [*range(10), 0, 0] and len(set(parts)) == 12
    records = {run.key(): {"run": asdict(run), "metrics": {"test": {}}} for run in chosen}
    records |= {key: {"metrics": {"test": {"exact_match_4096": 0.4 if key == parts[3] else 1.0}}} for key in parts}
    assert reasoning_report.prefix_sums(records).splitlines()[2].endswith("| 95.0% (40.0% to 100%) |")


def test_several_starts_and_longer_iteration_have_their_costs():
    """Of the size of the row; the vote costs what the starts do."""
    run = next(run for run in reasoning.runs() if run.evaluations and run.group == "gradients, mazes")
    at = lambda size, nfe: {f"exact_match{size}": 0.5, f"residual{size}": 1e-4, f"steps{size}": 9.0, f"forward_nfe{size}": nfe}  # noqa: E731
    once, starts = (
        at("", 10) | at("_13", 20),
        at("", 40) | at("_13", 80) | {"exact_match_vote": 1.0, "exact_match_vote_13": 1.0},
    )
    found = {"sweep": {"sweep": [], "metrics": {"test": once}}, "restarts": {"metrics": {"test": starts}}}
    results = {f"{run.stem}.{name}": {"run": asdict(run)} | result for name, result in found.items()}
    lines = reasoning_report.longer(results).splitlines()
    assert "| mazes, 7 | limit 150 | 50.0% | 1e-04 | 9 | 10 |" in lines
    assert "| mazes, 13 | 4 starts, lowest residual | 50.0% | 1e-04 | 9 | 80 |" in lines
    assert "| mazes, 13 | 4 starts, vote | 100% | - | - | 80 |" in lines


def test_results_taken_over_replace_those_of_the_same_runs_alone(tmp_path):
    """A folder that is lost takes no result with it."""
    kept, folder = tmp_path / "kept.jsonl", tmp_path / "runs" / "results"
    folder.mkdir(parents=True)
    for name, seconds in {"b_0": 1, "a_0": 2, "a_0.sweep": 3}.items():
        (folder / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    reasoning.take_over(folder.parent, kept)
    (folder / "b_0.json").unlink()
    (folder / "a_0.json").write_text(json.dumps({"seconds": 4}))
    reasoning.take_over(folder.parent, kept)
    found = records.read(kept)
    assert {key: record["seconds"] for key, record in found.items()} == {"a_0": 4, "a_0.sweep": 3, "b_0": 1}
    assert list(found) == sorted(found)


def test_the_page_shows_the_results():
    """Tables of docs/reasoning.md are those of the results that are kept, where they are complete."""
    page, made = (tables.DOCS / "reasoning.md").read_text(), reasoning_report.made(records.read(reasoning.RESULTS))
    for name, table in made.items():
        assert f"<!-- begin {name} -->\n{table.strip()}\n<!-- end {name} -->\n" in page, name


def test_a_table_waits_for_all_of_its_results():
    """Those of a run that failed end there."""
    group = [run for run in reasoning.runs() if run.group == "mazes of twice the side"]
    found = {run.stem: {"run": asdict(run), "metrics": {"test": {}}} for run in group}
    assert not reasoning_report.complete(found, group[0].group)
    found |= {f"{run.stem}.{name}": found[run.stem] for run in group for name in run.evaluations}
    assert [*reasoning_report.made(found)] == ["mazes of twice the side"]
    del found[f"{group[1].stem}.plain"]
    assert reasoning_report.made(found) == {}
    found[group[1].stem] = {"run": asdict(group[1]), "failed": "not finite"}
    assert reasoning_report.complete(found, group[0].group)


def test_a_run_waits_for_the_weights_it_starts_from(tmp_path, capsys):
    (run,) = (run for run in reasoning.runs() if run.name == "A5, 8 symbols" and run.seed == 0)
    reasoning.perform(run, tmp_path)
    assert "waits for state_tracking_a5_4_symbols_0" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()  # once, the missing checkpoint became its result


def test_a_run_that_diverges_is_a_result_and_one_in_use_is_none(tmp_path, monkeypatch):
    def train(*_, **__):
        raise error(reason)

    monkeypatch.setattr("deq_flax.train.loop.train", train)
    run = next(run for run in reasoning.runs() if run.group == "prefix sums")
    error, reason = UserError, "the workdir is in use"
    with pytest.raises(UserError, match="in use"):
        reasoning.perform(run, tmp_path)
    assert not (tmp_path / "results").exists()
    error, reason = DivergedError, "the loss or gradient was not finite 100 steps in a row"
    reasoning.perform(run, tmp_path)
    assert json.loads((tmp_path / "results" / f"{run.stem}.json").read_text())["failed"] == reason


@pytest.mark.slow
def test_a_run_is_made_once(tmp_path, capsys):
    small = {"data.size": 6, "data.test_sizes": (9,), "data.train_examples": 8, "data.valid_examples": 1}
    small |= {"data.test_examples": 2, "data.batch_size": 4, "model.width": 4, "train.steps": 2, "mesh.data": 1}
    evaluations = {"short": {"deq.eval_max_steps": 3}}
    run = reasoning.Run("bits", "as they are", "configs/prefix_sums.py", small, seed=1, evaluations=evaluations)
    reasoning.perform(run, tmp_path)
    reasoning.evaluate(run, tmp_path)
    assert "step 2/2" in capsys.readouterr().out
    file = tmp_path / "results" / "bits_as_they_are_1.json"
    found = json.loads(file.read_text())
    assert {"exact_match", "exact_match_9"} <= set(found["metrics"]["test"]) and found["megabytes"] > 0
    assert found["evaluations_a_step"] > 10 and found["seconds_a_step"] > 0
    short = json.loads((file.parent / "bits_as_they_are_1.short.json").read_text())
    assert short["metrics"]["test"]["steps"] <= 3
    reasoning.perform(run, tmp_path)
    reasoning.evaluate(run, tmp_path)
    assert capsys.readouterr().out == ""
