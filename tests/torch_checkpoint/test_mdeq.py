"""The tables of the multiscale DEQ cover the authors' files name by name, and their weights give the authors' logits."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from flax import nnx

from deq_flax.config import resolve
from deq_flax.convert import _without_auto, convert, to_torch
from deq_flax.equilibrium import Picard
from deq_flax.errors import UserError
from deq_flax.models import abstract_model
from deq_flax.pretrained import load_model
from deq_flax.torch_checkpoint import FAMILIES, family_of, mismatches, open_tensors, slots
from deq_flax.torch_checkpoint.mapping import counters
from deq_flax.train.step import split_model
from tests import mdeq_reference as reference
from tests.cases import others_slow
from tests.reference import QUICK_COMPILE, load, parameters, solving

LARGE = dict(channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), final_channels=1680, num_classes=10)
TINY = dict(channels=(24, 24), head_channels=(8, 16), final_channels=200, num_classes=10)
IMAGENET = dict(final_channels=2048, num_classes=1000, downsample=2)
SMALL_IMAGENET = IMAGENET | dict(channels=(32, 64, 128, 256), head_channels=(24, 48, 96, 192))
LARGE_IMAGENET = IMAGENET | dict(channels=(80, 160, 320, 640), head_channels=(32, 64, 128, 256))
XL_IMAGENET = LARGE_IMAGENET | dict(channels=(88, 176, 352, 704), expansion=6)
CITYSCAPES = dict(num_classes=19, downsample=2, fuse_norm_affine=True)
COMMON = dict(
    expansion=5,
    fuse_weight_norm="post",
    fuse_norm_affine=False,
    weight_norm=True,
    in_channels=3,
    big_kernels=(),
    downsample=0,
)
"""Options of the published models, where FULL_SIZE has no others."""
FULL_SIZE = {
    "deq_cifar/cls_mdeq_LARGE": LARGE,
    "deq_cifar/cls_mdeq_LARGE_reg": LARGE,
    "deq_cifar/cls_mdeq_TINY": TINY,
    "deq_imagenet/cls_mdeq_SMALL": SMALL_IMAGENET | dict(fuse_norm_affine=True),
    "deq_imagenet/cls_mdeq_SMALL_reg": SMALL_IMAGENET | dict(head_channels=(28, 56, 112, 224)),
    "deq_imagenet/cls_mdeq_LARGE": LARGE_IMAGENET | dict(fuse_norm_affine=True),
    "deq_imagenet/cls_mdeq_LARGE_reg": LARGE_IMAGENET,
    "deq_imagenet/cls_mdeq_XL": XL_IMAGENET | dict(fuse_norm_affine=True),
    "deq_cityscapes/seg_mdeq_SMALL": CITYSCAPES | dict(channels=(32, 64, 128, 256)),
    "deq_cityscapes/seg_mdeq_LARGE": CITYSCAPES | dict(channels=(80, 160, 320, 640)),
    "deq_cityscapes/seg_mdeq_XL": CITYSCAPES | dict(channels=(88, 176, 352, 704), expansion=6),
    "torchdeq_cifar_large": LARGE | dict(fuse_weight_norm="all", fuse_norm_affine=True),
    "torchdeq_cifar_small": TINY | dict(fuse_weight_norm="all", fuse_norm_affine=True),
    "torchdeq_imagenet": SMALL_IMAGENET | dict(fuse_weight_norm="none", fuse_norm_affine=True),
}


def config(name, **model):
    """A config of the task and head of a fixture or published model."""
    task = reference.task(name)
    required = {"data": {"name": "folders"}, "optimizer": {"learning_rate": 0.1}, "train": {"steps": 1}}
    return resolve(
        {"task": task, "model": {"name": "mdeq", "head": task, "num_classes": 10, "channels": (8, 8)} | model} | required
    )


@cache
def published(name):
    """(original shapes by name, number of parameters, our model of the published options)."""
    facts = reference.facts()["full_size"][name]
    shapes = {theirs: tuple(shape) for theirs, shape in facts["state_dict"].items()}
    return shapes, facts["n_params"], abstract_model(config(name, **COMMON | FULL_SIZE[name]).model)


def test_all_published_models_are_here():
    assert set(FULL_SIZE) == set(reference.facts()["full_size"])


@pytest.mark.parametrize("name", others_slow(FULL_SIZE, list(FULL_SIZE)[::4]))
def test_the_published_files_are_covered_name_by_name(name):
    shapes, n_params, model = published(name)
    family = FAMILIES[family_of("mdeq", shapes)]
    assert mismatches(family, model, shapes) == []
    found = {slot.theirs: slot.shape for slot in slots(family, model)} | dict.fromkeys(counters(family, model), ())
    assert found == shapes
    assert sum(param.size for param in parameters(model).values()) == n_params


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_published_options_are_inferred_from_the_shapes(name):
    shapes, _, _ = published(name)
    found = FAMILIES[family_of("mdeq", shapes)].infer(shapes)
    expected = COMMON | (dict(last_kernel=1) if "seg" in name else {}) | FULL_SIZE[name]
    # A model with more than two branches, or one that halves the resolution, has the same layers however often it does.
    assert found == expected | dict(downsample=0 if len(expected["channels"]) == 2 else None)


def converted(name, directory):
    """Convert a fixture, given the options that its shapes do not imply."""
    not_implied = ("groups", "downsample", "norm_momentum")
    given = {key: value for key, value in reference.options(name).items() if key in not_implied}
    convert(reference.source(name), directory, config(name, **given), auto=True, given=given)
    return directory


@partial(jax.jit, static_argnums=0, compiler_options=QUICK_COMPILE)
def run(graphdef, state, images):
    model = nnx.merge(graphdef, state)
    out = model(images, solve=solving(solver=Picard(tol=1e-6, max_steps=100)))
    return out.logits if out.logits.ndim == 2 else model.head(out.branches, False)


@pytest.mark.parametrize("name", reference.FIXTURES)
def test_converted_weights_give_the_authors_logits_and_go_back_unchanged(name, tmp_path):
    model, arrays = load_model(converted(name, tmp_path / "dir")).model, load(name)
    logits = run(*nnx.split(model), reference.images(arrays).astype(np.float32))
    np.testing.assert_allclose(np.moveaxis(logits, -1, 1), arrays["eval/logits"], atol=1e-4, rtol=1e-4)

    _, n_tensors = to_torch(tmp_path / "dir", tmp_path / "back.pth")
    with open_tensors(reference.source(name)) as theirs, open_tensors(tmp_path / "back.pth") as back:
        assert set(back.tensors) == set(theirs.tensors) and len(back.tensors) == n_tensors
        for tensor in theirs.tensors:
            found, expected = back.read(tensor), theirs.read(tensor)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_arrays_go_where_the_models_own_tests_put_them(tmp_path):
    found = split_model(load_model(converted("mdeq_tdeq_cls2", tmp_path / "dir")).model)[1:]
    expected = split_model(reference.build("mdeq_tdeq_cls2", wide=False))[1:]
    for ours, theirs in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_options_that_shapes_do_not_imply_must_be_given(tmp_path):
    with pytest.raises(UserError, match=r"does not tell the model's downsample: add --config\.model\.downsample="):
        convert(reference.source("mdeq_deq_cls4"), tmp_path / "dir", config("mdeq_deq_cls4", groups=4), auto=True)


@pytest.mark.parametrize(
    ("name", "file"), [("mdeq_deq_seg3", "cityscapes.py"), ("mdeq_tdeq_cls4", "cifar10.py"), ("lm_deq_postln", "wt103.py")]
)
def test_auto_starts_from_the_config_of_the_files_model_and_head(name, file):
    *before, flag = _without_auto(["convert", str(reference.source(name)), "DIR", "--config=auto"])
    assert flag == f"--config={file.removesuffix('.py')}"
    assert before == ["convert", str(reference.source(name)), "DIR"]


def test_a_config_that_does_not_fit_is_refused_with_one_that_does(tmp_path):
    name = "mdeq_tdeq_cls2"
    wrong = config(name, **reference.options(name) | dict(fuse_weight_norm="none", head_channels=(2, 5)))
    with pytest.raises(UserError, match=r"It fits with .*head_channels=2,4") as caught:
        convert(reference.source(name), tmp_path / "dir", wrong)
    assert "--config.model.fuse_weight_norm=all" in str(caught.value)


def test_weights_of_the_other_head_are_refused(tmp_path):
    wrong = config("mdeq_deq_cls2", **reference.options("mdeq_deq_cls2"))
    with pytest.raises(UserError, match=r"48 unknown: stage0"):
        convert(reference.source("mdeq_deq_seg3"), tmp_path / "dir", wrong)


def test_counters_may_be_missing():
    model = reference.build("mdeq_deq_cls2", wide=False)
    with open_tensors(reference.source("mdeq_deq_cls2")) as file:
        names = counters(FAMILIES["mdeq"], model)
        assert set(names) == {name for name in file.tensors if name.endswith("num_batches_tracked")}
        assert mismatches(FAMILIES["mdeq"], model, {k: v for k, v in file.shapes.items() if k not in names}) == []
