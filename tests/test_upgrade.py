"""Runs of an earlier version, stored in tests/data/stored: they are read, evaluated and continued.

Their configs name no model, leave the size of the vocabulary to the text, and hold options that no longer exist.
"""

import json
import zipfile

import numpy as np
import pytest

from deq_flax.config import make_task, phases_of, read_run_config, to_dict
from deq_flax.config_files import stored_config
from deq_flax.devices.mesh import MeshOptions
from deq_flax.errors import UserError
from deq_flax.main import _refuse_another_config
from deq_flax.pretrained import load_model
from deq_flax.train.evaluate import EvalOptions, evaluate_checkpoint
from tests.cases import others_slow
from tests.commands import ROOT
from tests.tasks.images import write_labeled, write_scenes
from tests.test_configs import resolved
from tests.train import small

MODELS = {
    "language": "DEQTransformer",
    "explicit_language": "TransformerXL",
    "classification": "MDEQ",
    "segmentation": "MDEQ",
}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A function that unpacks the run of a name. Its config names its data by a path relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, write in (("tokens", small.write_tokens), ("images", write_labeled), ("scenes", write_scenes)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)

    def unpack(name):
        with zipfile.ZipFile(ROOT / "tests" / "data" / "stored" / f"{name}.zip") as archive:
            archive.extractall(tmp_path)
        return tmp_path / name

    return unpack


def last_evaluation(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == "valid"][-1]


@pytest.mark.parametrize("name", others_slow(MODELS, list(MODELS)[:2]))
def test_an_earlier_run_evaluates_to_its_own_numbers(stored, name):
    workdir = stored(name)
    config = read_run_config(workdir)
    phases, options = phases_of(config), EvalOptions()
    result = evaluate_checkpoint(make_task(config), workdir, phases=phases, mesh=MeshOptions(data=1), options=options, seed=0)
    expected = last_evaluation(workdir)
    assert result.step == expected["step"] == 2
    for metric in expected.keys() - {"step", "split"}:
        np.testing.assert_allclose(result.metrics["valid"][metric], expected[metric], rtol=1e-4, err_msg=metric)


@pytest.mark.parametrize("name", MODELS)
def test_an_earlier_checkpoint_loads_as_its_model(stored, name):
    loaded = load_model(stored(name))
    assert type(loaded.model).__name__ == MODELS[name]
    if loaded.config.task == "language":
        assert loaded.config.model.vocab_size == 39  # the largest id plus one, as in its arrays


def test_an_earlier_run_that_left_its_vocabulary_to_the_text_is_no_run_of_another_config(stored):
    workdir = stored("language")
    record = to_dict(read_run_config(workdir))
    assert record["model"]["vocab_size"] == 0
    record["model"]["vocab_size"] = 39
    _refuse_another_config(record, workdir)
    record["model"]["d_model"] += 2
    with pytest.raises(UserError, match=r"differs in model\.d_model \(16 there, 18 here\):"):
        _refuse_another_config(record, workdir)


def test_a_config_that_is_whole_is_not_completed_from_arrays():
    config = to_dict(resolved("wt103", "tiny"))
    config["model"]["vocab_size"] = 1000
    assert to_dict(stored_config({"config": config})) == config
    config["model"]["vocab_size"] = 0
    with pytest.raises(UserError, match="does not hold the config of a model"):
        stored_config({"config": config})


@pytest.mark.slow
def test_an_earlier_run_continues(stored):
    """The state of the optimizer, the memory and the position in the data are restored."""
    workdir = stored("language")
    config = read_run_config(workdir)
    longer = small.resolve(small.to_dict(config) | {"train": small.to_dict(config)["train"] | {"steps": 4}})
    result = small.run(longer, workdir)
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert not result.interrupted and steps[0] == 1 and max(steps) == 4
