"""Laws of what `--config` may name: recipes, files, and the configs that runs have stored."""

import json

import pytest

from deq_flax import config_files
from deq_flax.config import resolve, to_dict
from deq_flax.config_files import load_config, run_config
from deq_flax.errors import UserError
from tests.commands import ROOT
from tests.test_configs import resolved


def test_a_recipe_is_named_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve(load_config("wt103:tiny")) == resolved("wt103", "tiny")
    assert resolve(load_config("ptb")) == resolved("ptb", "base")
    assert {path.stem for path in config_files.RECIPES.glob("*.py")} == {path.stem for path in (ROOT / "configs").glob("*.py")}


def test_a_recipe_and_its_file_are_the_same():
    assert load_config(f"{ROOT}/configs/wt103.py:tiny") == load_config("wt103:tiny")


def test_the_config_of_a_run_gives_the_same_run(tmp_path):
    config = resolved("wt103", "deq_lm")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert resolve(load_config(f"{tmp_path}/config.json")) == run_config(str(tmp_path)) == config
    assert resolve(load_config(f"{tmp_path}/config.json"), [("train.steps", "3"), ("deq.max_steps", "5")]).deq.max_steps == 5
    assert run_config(str(tmp_path / "other")) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wt13:tiny", "unknown config 'wt13'; did you mean 'wt103'? (a file is named FILE.py)"),
        ("transformer", "known: camvid, cifar10"),
        ("wt103:huge", "unknown variant 'huge'; known: base, reg"),
        ("digits:tiny", "config digits:tiny: it has no variants: leave out :tiny"),
        ("somewhere/wt103.py", "there is no such file, or it cannot be opened; the recipe of this name: --config wt103"),
        ("none/config.json", "cannot read none/config.json: No such file or directory"),
    ],
)
def test_what_cannot_be_found_is_one_line_that_says_what_can(name, message):
    with pytest.raises(UserError) as caught:
        load_config(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["no json", "[1]", "{}", '{"task": "language", "model": {}}', "[" * 100_000, '"\\ud800'])
def test_a_config_json_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        run_config(str(tmp_path))
    assert "\n" not in str(caught.value)
