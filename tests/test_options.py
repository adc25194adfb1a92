"""Laws of options: a mapping or a text becomes a checked dataclass, or one line that describes the error."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from deq_flax import options
from deq_flax.config import recipe, reference, resolve, section_types, to_dict
from deq_flax.data.images.labeled_datasets import LABELED, ImageOptions
from deq_flax.data.images.scene_datasets import SCENES, SceneOptions
from deq_flax.data.puzzles.puzzles import PUZZLES, PuzzleOptions
from deq_flax.data.text.corpus import TEXTS, TextOptions
from deq_flax.equilibrium import GRADIENTS, SOLVERS
from deq_flax.errors import UserError
from deq_flax.models import MODELS
from deq_flax.tasks import TASKS
from deq_flax.train.phases import DEQOptions
from tests.commands import ROOT


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section with an option of every kind."""

    steps: int
    """Steps to take."""
    rate: float = 0.5
    """Rate of
    decay."""
    name: str = "a"
    on: bool = False
    kind: Literal["up", "down"] = "up"
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def make(**values):
    return options.make(Section, values, "part")


def test_values_take_the_type_of_their_option():
    made = make(steps=3, rate=2, sizes=[1, 2], pair=[1, 2], more={"x": 1})
    assert made == Section(steps=3, rate=2.0, sizes=(1, 2), pair=(1.0, 2.0), more={"x": 1})
    assert isinstance(made.rate, float) and isinstance(made.pair[0], float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "part.steps is missing from the config"),
        ({"steps": 1, "stepps": 2}, "part has no key 'stepps'; did you mean 'steps'?"),
        ({"steps": 1, "qqq": 2}, "part has no key 'qqq'; known: steps, rate"),
        ({"steps": 1.0}, "part.steps must be a whole number, not 1.0"),
        ({"steps": True}, "part.steps must be a whole number, not True"),
        ({"steps": 1, "rate": "fast"}, "part.rate must be a number, not 'fast'"),
        ({"steps": 1, "on": 1}, "part.on must be True or False, not 1"),
        ({"steps": 1, "name": 1}, "part.name must be a string, not 1"),
        ({"steps": 1, "kind": "left"}, "unknown part.kind 'left'; known: up, down"),
        ({"steps": 1, "sizes": 3}, "part.sizes must be any number of values"),
        ({"steps": 1, "sizes": (1, "b")}, "part.sizes must be a whole number, not 'b'"),
        ({"steps": 1, "pair": (1.0,)}, "part.pair must be 2 numbers, not 1.0"),
        ({"steps": 1, "more": 3}, "part.more must be a mapping"),
        ({"steps": 0}, "part: steps must be at least 1"),
    ],
)
def test_an_invalid_option_is_one_line(values, message):
    with pytest.raises(UserError) as error:
        make(**values)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "12", 12), ("rate", "1e-3", 1e-3), ("rate", "2", 2.0), ("name", "007", "007"), ("on", "true", True),
        ("on", "False", False), ("kind", "down", "down"), ("sizes", "1,2", (1, 2)), ("sizes", "(3,)", (3,)), ("sizes", "", ()),
        ("sizes", "()", ()), ("pair", "0.5, 2", (0.5, 2.0)), ("more", "{'a': 1}", {"a": 1}),
    ],
)  # fmt: skip
def test_text_becomes_a_value_of_the_options_type(name, text, value):
    parsed = options.parse(text, options.hints_of(Section)[name], name)
    assert parsed == value and type(parsed) is type(value)
    assert getattr(options.make(Section, {"steps": 1} | {name: parsed}, "part"), name) == value


@pytest.mark.parametrize(
    ("name", "text"), [("steps", "1.5"), ("steps", "x"), ("rate", "x"), ("on", "maybe"), ("sizes", "1,,2")]
)
def test_text_that_is_no_value_of_the_option_is_refused(name, text):
    with pytest.raises(UserError, match=f"{name} must be"):
        options.parse(text, options.hints_of(Section)[name], name)


def test_documentation_is_the_string_below_a_field():
    assert options.docs_of(Section) == {"steps": "Steps to take.", "rate": "Rate of decay."}


TABLE = {"one": 1}


@dataclass(frozen=True)
class Named:
    name: str
    """Name: {TABLE}."""


def test_documentation_has_the_names_of_a_table(monkeypatch):
    assert options.docs_of(Named) == {"name": "Name: one."}
    for name in ("two", "three"):
        monkeypatch.setitem(TABLE, name, 0)
    assert options.docs_of(Named) == {"name": "Name: one, two or three."}


@pytest.mark.parametrize(
    ("cls", "option", "table"),
    [
        (DEQOptions, "solver", SOLVERS),
        (DEQOptions, "gradient", GRADIENTS),
        (DEQOptions, "backward_solver", SOLVERS),
        (TextOptions, "name", TEXTS),
        (ImageOptions, "name", LABELED),
        (SceneOptions, "name", SCENES),
        (PuzzleOptions, "name", PUZZLES),
    ],
)
def test_an_option_that_names_an_entry_of_a_table_lists_them_all(cls, option, table, monkeypatch):
    monkeypatch.setitem(table, "brand_new", None)
    assert all(re.search(rf"\b{name}\b", options.docs_of(cls)[option]) for name in table)


def sections():
    """Every dataclass of every section."""
    for task_name, task in TASKS.items():
        for model_name, model in MODELS.items():
            if model.kind == task.kind:
                for name, cls in section_types({"task": task_name, "model": {"name": model_name}}).items():
                    yield f"{task_name} {model_name} {name}", cls


@pytest.mark.parametrize(("name", "cls"), list(sections()))
def test_every_option_of_every_section_is_documented(name, cls):
    docs = options.docs_of(cls)
    for option in options.hints_of(cls):
        assert docs.get(option, "").endswith("."), f"{cls.__name__}.{option}"


def test_the_reference_is_up_to_date():
    """docs/configuration.md: python -m deq_flax.config > docs/configuration.md."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()


MODEL = {"name": "deq_transformer", "d_model": 32, "d_embed": 32, "n_head": 2, "d_head": 16, "d_inner": 8}
BASE = {"task": "language", "data": {"name": "pydoc"}, "model": MODEL, "train": {"steps": 3}}


def test_a_resolved_config_resolves_to_itself():
    config = resolve(BASE)
    assert resolve(to_dict(config)) == config and config.train.steps == 3 and config.loss is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "speech"}, "unknown task 'speech'; known: language, classification, segmentation"),
        ({"model": {}}, "model.name is missing from the config; known: deq_transformer"),
        ({"model": {"name": "lstm"}}, "unknown model.name 'lstm'"),
        ({"model": {"name": "mdeq"}}, "is no model for task 'language'; known: deq_transformer, transformer_xl"),
        ({"model": MODEL | {"name": "transformer_xl"}, "deq": {"tol": 1e-3}}, "no equilibrium: leave out section deq"),
        ({"optimzer": {}}, "the config has no section 'optimzer'; did you mean 'optimizer'?"),
        ({"loss": {}}, "the config has no section 'loss'"),
        ({"train": 3}, "train is a section of the config, not 3"),
        ({"data": {"name": "pydoc", "path": "", "bath": 1}}, "data has no key 'bath'; did you mean 'path'?"),
        ({"mesh": {"date": 1}}, "mesh has no key 'date'; did you mean 'data'?"),
        ({"checkpoint": {"keep_last": 1}}, "checkpoint has no key 'keep_last'; did you mean 'keep_"),
        ({"eval": {"max_steps_sweep": 3}}, "eval.max_steps_sweep must be"),
    ],
)
def test_every_section_is_checked_in_the_same_way(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(BASE | changes)


def test_a_recipe_is_a_difference():
    variants = {"base": {}, "other": {"model.d_model": 3, "mesh.fsdp": 2, "train": None}}
    assert recipe(BASE, variants, "base").to_dict() == BASE
    other = recipe(BASE, variants, "other").to_dict()
    assert other["model"] == MODEL | {"d_model": 3} and other["mesh"] == {"fsdp": 2} and "train" not in other
    assert MODEL["d_model"] == 32
    with pytest.raises(ValueError, match="unknown variant 'bass'; known: base, other"):
        recipe(BASE, variants, "bass")
