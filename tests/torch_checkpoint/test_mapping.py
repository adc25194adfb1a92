"""The tables of names: each original tensor maps to one array of ours, all are filled, mismatches are listed in full."""

import dataclasses
import itertools

import numpy as np
import pytest

from deq_flax.errors import UserError
from deq_flax.models import abstract_model
from deq_flax.torch_checkpoint import (
    FAMILIES,
    convert_tensors,
    export_tensors,
    family_name,
    family_of,
    get_arrays,
    head_of,
    mismatches,
    model_of,
    open_tensors,
    set_arrays,
    slots,
    write_state_dict,
)
from deq_flax.torch_checkpoint.mapping import Row
from tests import reference
from tests.test_configs import LANGUAGE, resolved

FAMILY = FAMILIES["deq_transformer"]
FULL_SIZE = {name: tuple(shape) for name, shape in reference.facts()["wt103"]["state_dict"].items()}
POSTLN = reference.FOLDER / "lm_deq_postln.pth"


def options(variant="base", **changes):
    """The model options of a variant of configs/wt103.py."""
    return dataclasses.replace(resolved("wt103", variant).model, **changes)


def fitting(path):
    """The model, of shapes alone, that a file's shapes imply."""
    with open_tensors(path) as file:
        return abstract_model(options(**FAMILY.infer(file.shapes)))


def rewritten(tmp_path, **changed):
    """The path of a copy of the fixture with some tensors replaced ('/' for '.' in names), each in a storage of its own."""
    with open_tensors(POSTLN) as file:
        arrays = {name: np.array(file.read(name)) for name in file.tensors}
    arrays |= {name.replace("/", "."): value for name, value in changed.items()}
    write_state_dict(tmp_path / "x.pth", ((name, name, x) for name, x in arrays.items() if x is not None))
    return tmp_path / "x.pth"


OTHER_MODELS = ("deq_lm", "explicit", "proposal")


@pytest.mark.parametrize(
    "variant", [name for name in LANGUAGE["wt103"].VARIANTS if not name.startswith("tiny") and name not in OTHER_MODELS]
)
def test_the_published_files_are_covered_name_by_name(variant):
    model = abstract_model(options(variant, vocab_size=267_735))
    assert mismatches(FAMILY, model, FULL_SIZE) == []
    found = {slot.theirs: slot.shape for slot in slots(FAMILY, model)}
    assert found | {"pos_emb.inv_freq": (350,)} == FULL_SIZE


def test_the_published_config_is_inferred_from_the_shapes():
    found = FAMILY.infer(FULL_SIZE)
    expected = dataclasses.asdict(options(vocab_size=267_735))
    assert found == {name: expected[name] for name in found}
    not_implied = {"name", "blocks", "pre_norm", "affine_norm", "norm", "positions", "gated", "mem_len", "local_size", "dtype"}
    not_implied |= {"dropout", "attention_dropout", "output_dropout"}
    assert set(expected) - set(found) == not_implied


@pytest.mark.parametrize("name", ["lm_deq_postln", "lm_deq_nocut", "lm_tdeq_postln"])
def test_every_parameter_is_filled(name):
    model = fitting(reference.FOLDER / f"{name}.pth")
    assert {slot.path for slot in slots(FAMILY, model)} == set(reference.parameters(model))


@pytest.mark.parametrize("name", ["lm_deq_postln", "lm_deq_nocut", "lm_tdeq_postln"])
def test_arrays_go_where_the_models_own_tests_put_them(name):
    model, weights = fitting(reference.FOLDER / f"{name}.pth"), reference.load(f"{name}_weights")
    with open_tensors(reference.FOLDER / f"{name}.pth") as file:
        arrays, buffers = convert_tensors(FAMILY, model, file)
    n_projections = sum("emb_projs" in key for key in weights)
    for theirs, array in weights.items():
        if theirs in buffers:
            np.testing.assert_array_equal(buffers[theirs], array)
        else:
            ours = arrays[reference.our_name(theirs, n_projections)]
            np.testing.assert_array_equal(ours, reference.our_layout(theirs, array))


def test_export_undoes_convert():
    model = fitting(POSTLN)
    with open_tensors(POSTLN) as file:
        arrays, buffers = convert_tensors(FAMILY, model, file)
        set_arrays(model, arrays)
        exported = {name: array for name, _, array in export_tensors(FAMILY, model, get_arrays(model), buffers)}
        assert set(exported) == set(file.tensors)
        for name, array in exported.items():
            np.testing.assert_array_equal(array, file.read(name))


@pytest.mark.parametrize("axes", [(0,), (1, 0), (None, 1, 0), (3, 2, 0, 1), (2, None, 0, 1)])
def test_layouts_undo_each_other(axes):
    shape = tuple(range(2, 2 + len([axis for axis in axes if axis is not None])))
    ours = np.random.default_rng(0).normal(size=shape)
    row = Row("", "", axes)
    theirs = row.to_theirs(ours)
    assert theirs.shape == row.their_shape(shape)
    np.testing.assert_array_equal(row.to_ours(theirs), ours)


def test_mismatches_are_listed_in_full():
    shapes = {name: shape for name, shape in FULL_SIZE.items() if "ff1_net" not in name} | {"extra.a": (1,), "extra.b": (2,)}
    shapes["crit.cluster_bias"] = (4,)
    unknown, missing, other = mismatches(FAMILY, abstract_model(options(vocab_size=267_735)), shapes)
    assert unknown == "2 unknown: extra.a, extra.b"
    lost = ("weight_g [48000, 1]", "weight_v [48000, 700]", "bias [48000]")
    assert missing == "3 missing: " + ", ".join(f"func.pos_ff.ff1_net.{leaf}" for leaf in lost)
    assert other == "1 of another shape: crit.cluster_bias is [4] and should be [3]"


def test_tied_weights_that_differ_are_named(tmp_path):
    model = fitting(POSTLN)
    path = rewritten(tmp_path)
    with open_tensors(path) as file:
        convert_tensors(FAMILY, model, file)  # equal copies are accepted like one storage
    changed = {
        "crit/out_layers/1/weight": np.zeros((300, 8), np.float32),
        "crit/out_projs/2/weight": np.ones((32, 2), np.float32),
    }
    with open_tensors(rewritten(tmp_path, **changed)) as file, pytest.raises(UserError) as caught:
        convert_tensors(FAMILY, model, file)
    for name in ("emb_layers.1.weight and crit.out_layers.1.weight", "emb_projs.2.weight and crit.out_projs.2.weight"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inject_conv.bias", np.full(96, np.nan, np.float32), "no trained model has, in inject_conv.bias"),
        ("inject_conv.bias", np.zeros(96, np.int64), "inject_conv.bias is of type int64"),
        ("pos_emb.inv_freq", np.ones(16, np.float32), "no trained model has, in pos_emb.inv_freq"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, name, value, message):
    path = rewritten(tmp_path, **{name.replace(".", "/"): value})
    with open_tensors(path) as file, pytest.raises(UserError, match=message):
        convert_tensors(FAMILY, fitting(POSTLN), file)


def test_buffers_may_be_missing(tmp_path):
    path = rewritten(tmp_path, **{"pos_emb/inv_freq": None})
    model = fitting(path)
    with open_tensors(path) as file:
        assert mismatches(FAMILY, model, file.shapes) == []
        assert convert_tensors(FAMILY, model, file)[1] == {}


@pytest.mark.slow
def test_sizes_are_inferred_for_every_model_that_can_be_built():
    """Names and shapes of random models: inferring from them gives a model that they fit."""
    sizes = itertools.product([(), (200,), (200, 500)], [1, 2, 4], [(32, 32), (32, 16)], [False, True])
    for cutoffs, div_value, (d_model, d_embed), weight_norm in sizes:
        changes = dict(cutoffs=cutoffs, div_value=div_value, d_model=d_model, d_embed=d_embed, weight_norm=weight_norm)
        model = abstract_model(options(vocab_size=1000, n_head=3, d_head=4, d_inner=7, **changes))
        shapes = {slot.theirs: slot.shape for slot in slots(FAMILY, model)}
        found = FAMILY.infer(shapes)
        assert (found["cutoffs"] is None) == (div_value == 1 and cutoffs != ())
        again = abstract_model(options(**found | {"cutoffs": cutoffs}))
        assert mismatches(FAMILY, again, shapes) == []


@pytest.mark.parametrize(
    ("prefix", "head", "model", "found_head", "family"),
    [
        ("func.", "crit.cluster_bias", "deq_transformer", None, "deq_transformer"),
        ("fullstage.", "classifier.weight", "mdeq", "classification", "mdeq"),
        ("full_stage.", "last_layer.3.weight", "mdeq", "segmentation", "mdeq_torchdeq"),
    ],
)
def test_names_imply_model_head_and_family(prefix, head, model, found_head, family):
    names = [f"{prefix}x.weight", head]
    assert (model_of(names), head_of(names), family_of(model, names)) == (model, found_head, family)


def test_unclear_names_imply_the_first_family():
    assert (model_of(["x"]), head_of(["x"])) == ("deq_transformer", None)
    assert (family_of("deq_transformer"), family_of("mdeq", ["x"])) == ("deq_transformer", "mdeq")


def test_a_model_without_a_counterpart_is_refused():
    with pytest.raises(UserError, match="weights of model 'transformer_xl' cannot be converted; known: deq_transformer, mdeq"):
        family_of("transformer_xl", ["func.x"])


def test_families_of_earlier_checkpoints_are_known():
    assert [family_name(stored) for stored in ("language", "mdeq", "mdeq_torchdeq")] == [
        "deq_transformer",
        "mdeq",
        "mdeq_torchdeq",
    ]


@pytest.mark.parametrize("kind", FAMILIES)
def test_inferring_options_survives_any_shapes(kind):
    """The names that options are inferred from, with shapes that no model has: the answer is bounded, and nothing is raised."""
    names = ["inject_conv.weight", "func.dec_attn.r_w_bias", "func.pos_ff.ff1_net.bias", "crit.cluster_weight"]
    names += [f"word_emb.emb_layers.{i}.weight" for i in range(100)] + ["word_emb.emb_projs.0.weight"]
    names += [
        f"{stage}.branches.{i}.blocks.0.conv{k}.weight"
        for stage in ("fullstage", "full_stage")
        for i in range(9)
        for k in (1, 2)
    ]
    names += [
        "downsample.0.weight",
        "classifier.weight",
        "last_layer.3.weight",
        *(f"incre_modules.{i}.0.conv1.weight" for i in range(4)),
    ]
    odd = [(), (0,), (3,), (4, 2), (0, 0), (10**30, 0), (10**10, 1), (1, 10**10), (5, 4, 3, 3), (0, 1, 1, 1), (1,) * 8]
    random, family = np.random.default_rng(0), FAMILIES[kind]
    for count in (len(names), len(names), 20, 10) * 20:
        shapes = {name: odd[random.integers(len(odd))] for name in random.permutation(names)[:count]}
        assert len(str(family.infer(shapes))) < 10_000
