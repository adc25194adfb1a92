"""The sections `data`: checked, and immutable."""

import dataclasses

import pytest

from deq_flax.data.images.labeled_datasets import ImageOptions
from deq_flax.data.images.scene_datasets import SceneOptions
from deq_flax.data.text.corpus import TextOptions
from deq_flax.errors import UserError

LEAST = {"batch_size": 1, "eval_batch_size": 1, "seq_len": 1, "eval_seq_len": 1, "pad": 0, "max_damaged": 0, "pictures": 0}
SECTIONS = (TextOptions, ImageOptions, SceneOptions)


@pytest.mark.parametrize("section", SECTIONS)
def test_lists_become_tuples(section):
    default = section(name="folders")
    as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(default).items()}
    assert section(**as_lists) == default
    assert hash(section(**as_lists)) == hash(default)


@pytest.mark.parametrize(
    ("section", "name", "least"),
    [(section, name, least) for section in SECTIONS for name, least in LEAST.items() if name in section.__dataclass_fields__],
)
def test_numbers_have_a_minimum(section, name, least):
    assert getattr(section(**{"name": "folders", name: least}), name) == least
    with pytest.raises(UserError, match=f"data.{name} must be at least {least}, not {least - 1}"):
        section(**{"name": "folders", name: least - 1})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"crop_size": (0, 8)}, "1 or more"),
        ({"eval_size": (8,)}, "1 or more"),
        ({"scales": ()}, "positive numbers"),
        ({"scales": (1.0, 0.0)}, "positive numbers"),
        ({"ignored": (5,)}, "knows what to ignore"),
    ],
)
def test_scene_options_that_make_no_sense_are_refused(changed, message):
    with pytest.raises(UserError, match=message):
        SceneOptions(name="camvid", **changed)
