"""The convert command: the authors' weights give the authors' numbers, and convert back bit for bit."""

import dataclasses
import errno
import json
import os
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from deq_flax.checkpoints.loading import load_meta, load_params
from deq_flax.config import from_stored, make_task, phases_of
from deq_flax.convert import _with_model, convert, to_torch
from deq_flax.equilibrium import Picard
from deq_flax.errors import UserError
from deq_flax.models import abstract_model
from deq_flax.pretrained import load_model
from deq_flax.torch_checkpoint import FAMILIES, open_tensors
from deq_flax.train.evaluate import EvalOptions, evaluate_checkpoint
from deq_flax.train.step import split_model
from tests import reference
from tests.cases import others_slow
from tests.commands import command
from tests.test_configs import resolved

FIXTURES = ["lm_deq_postln", "lm_deq_preln", "lm_deq_local", "lm_deq_div1", "lm_deq_nocut", "lm_tdeq_postln"]


def source(name):
    return reference.FOLDER / f"{name}.pth"


def config(**model):
    """The config of wt103 with changed model options."""
    return changed(resolved("wt103", "base"), model=model)


def changed(config, **sections):
    """A config with changed options, {section: {name: value}}."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **options) for name, options in sections.items()}
    )


def converted(name, directory):
    """Convert a fixture; options that its shapes do not imply come from its hyperparameters."""
    h = reference.facts()["hparams"][name]
    given = dict(pre_norm=h["pre_lnorm"], mem_len=h["mem_len"], local_size=h["local_size"], cutoffs=tuple(h["cutoffs"]))
    convert(source(name), directory, config(**given), auto=True, given=given)
    return directory


@partial(jax.jit, static_argnums=0, compiler_options=reference.QUICK_COMPILE)
def run(graphdef, state, tokens_BL, targets_BL, memory):
    model = nnx.merge(graphdef, state)
    out = model(tokens_BL, memory, solve=reference.solving(solver=Picard(tol=1e-6, max_steps=200)))
    return model.nll(out.hidden_BLD, targets_BL), out.memory


@pytest.mark.parametrize("name", others_slow(FIXTURES, FIXTURES[:1]))
def test_converted_weights_give_the_authors_likelihoods(name, tmp_path):
    model = load_model(converted(name, tmp_path / "dir")).model
    arrays, memory = reference.load(name), model.fresh_memory(2)
    for s in range(2):
        data = [reference.by_batch(arrays[f"seg{s}/{key}"]) for key in ("data", "target")]
        nll_BL, memory = run(*nnx.split(model), *data, memory)
        np.testing.assert_allclose(nll_BL.mean(), arrays[f"seg{s}/loss"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(nll_BL, arrays[f"seg{s}/nll"].T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FIXTURES)
def test_converting_back_is_bit_identical(name, tmp_path):
    to_torch(converted(name, tmp_path / "dir"), tmp_path / "back.pth")
    with open_tensors(source(name)) as theirs, open_tensors(tmp_path / "back.pth") as back:
        assert set(theirs.tensors) == set(back.tensors)
        for key in theirs.tensors:
            a, b = theirs.read(key), back.read(key)
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), key
        tied = ("word_emb.emb_layers.0.weight", "crit.out_layers.0.weight")
        assert back.tensors[tied[0]].same_elements(back.tensors[tied[1]])


def test_the_result_is_an_ordinary_checkpoint(tmp_path):
    folder = converted("lm_deq_postln", tmp_path / "dir")
    meta, written = load_meta(folder), json.loads((folder / "config.json").read_text())
    assert meta["step"] == 0 and meta["config"] == written and written["model"]["vocab_size"] == 1000
    params = split_model(abstract_model(from_stored(written).model))[1]
    weights = load_params(folder, params).eval_params  # as checkpoint.init_from does
    stored = reference.load("lm_deq_postln_weights")["word_emb.emb_layers.1.weight"]
    np.testing.assert_array_equal(weights["embedding"]["tables_NE"][1], stored)


@pytest.mark.slow
def test_memory_and_max_steps_may_change_for_evaluation(tmp_path):
    folder = converted("lm_deq_nocut", tmp_path / "dir")
    random, data = np.random.default_rng(0), tmp_path
    for split in ("train", "valid", "test"):
        np.save(data / f"{split}.npy", random.integers(0, 1000, 100).astype(np.int32))

    stored = load_model(folder).config
    lengths = dict(batch_size=4, seq_len=8, eval_batch_size=2, eval_seq_len=8)
    stored = changed(stored, data=dict(name="tokens", path=str(data)) | lengths, mesh=dict(data=1))

    def evaluate(mem_len, max_steps, **options):
        config = changed(stored, model={"mem_len": mem_len}, deq=dict(solver="picard", max_steps=max_steps, tol=1e-4))
        evaluated = dict(phases=phases_of(config), mesh=config.mesh, options=EvalOptions(**options), seed=0)
        return evaluate_checkpoint(make_task(config), folder, **evaluated)

    usual = evaluate(16, 40, spectral_radius=True, max_steps_sweep=(2, 4, 40))
    longer = evaluate(40, 6)
    assert usual.metrics["valid"]["loss"] != longer.metrics["valid"]["loss"]
    assert longer.metrics["valid"]["forward_nfe"] == 6 < usual.metrics["valid"]["forward_nfe"]
    radii = [usual.metrics["valid"].pop(f"spectral_radius_{kind}") for kind in ("mean", "max")]
    assert 0 < radii[0] <= radii[1]
    table = [row for row in usual.sweep if row["split"] == "valid"]
    assert [row["max_steps"] for row in table] == [2, 4, 40]
    assert [row["forward_nfe"] for row in table[:2]] == [2, 4]
    assert table[0]["forward_residual"] > table[1]["forward_residual"] > table[2]["forward_residual"]
    assert usual.metrics["valid"].items() <= table[2].items()


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("lm_deq_postln", {"d_inner": 65}, "It fits with --config.model.d_inner=64"),
        (
            "lm_deq_postln",
            {"cutoffs": (200, 501), "weight_norm": False},
            "--config.model.weight_norm=True --config.model.cutoffs=200,500",
        ),
        ("lm_deq_postln", {"vocab_size": 2000}, "It fits with --config.model.vocab_size=1000"),
        ("lm_deq_nocut", {}, "It fits with --config.model.cutoffs=()"),
        ("lm_deq_div1", {"cutoffs": (200,)}, "unknown"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_with_one_that_does(name, wrong, message, tmp_path):
    with open_tensors(source(name)) as file:
        found = {key: value for key, value in FAMILIES["deq_transformer"].infer(file.shapes).items() if value is not None}
    base = config(**(found if wrong else {key: found[key] for key in found if key != "cutoffs"}) | wrong)
    with pytest.raises(UserError) as caught:
        convert(source(name), tmp_path / "dir", base)
    assert message in str(caught.value) and str(source(name)) in str(caught.value)
    assert not (tmp_path / "dir").exists()


def test_options_that_shapes_do_not_imply_must_be_given(tmp_path):
    with pytest.raises(UserError, match=r"does not tell the model's cutoffs: add --config\.model\.cutoffs="):
        convert(source("lm_deq_div1"), tmp_path / "dir", config(), auto=True)


def test_a_checkpoint_of_an_earlier_version_converts_back_too(tmp_path, monkeypatch):
    folder = converted("lm_deq_nocut", tmp_path / "dir")
    loaded = load_model(folder)
    earlier = dataclasses.replace(loaded, meta=loaded.meta | {"converted": loaded.meta["converted"] | {"family": "language"}})
    monkeypatch.setattr("deq_flax.convert.load_model", lambda checkpoint: earlier)
    _, n_tensors = to_torch(folder, tmp_path / "back.pth")
    with open_tensors(source("lm_deq_nocut")) as file:
        assert n_tensors == len(file.tensors)


def test_a_model_without_a_counterpart_is_refused(tmp_path):
    explicit = resolved("wt103", "explicit")
    with pytest.raises(UserError, match="weights of model 'transformer_xl' cannot be converted"):
        convert(source("lm_deq_nocut"), tmp_path / "dir", explicit)
    assert not (tmp_path / "dir").exists()


def test_options_that_no_model_can_have_are_a_user_error():
    with pytest.raises(UserError, match="section model: blocks must be at least 1"):
        abstract_model(_with_model(config(vocab_size=267_735), {"blocks": 0}).model)


def test_a_folder_in_use_is_not_changed(tmp_path):
    folder = converted("lm_deq_nocut", tmp_path / "dir")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="holds a run already"):
        converted("lm_deq_nocut", folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_config_that_the_disk_refuses_is_not_left_half_written(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(number):
        if "config.json" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left"):
        converted("lm_deq_nocut", tmp_path / "dir")
    assert not list((tmp_path / "dir").glob("*config.json*"))


@pytest.mark.slow
def test_the_command(tmp_path):
    done = command("convert", source("lm_deq_postln"), tmp_path / "dir", "--config", "auto", "--config.model.mem_len=16")
    assert done.returncode == 0 and "wrote 26,066 parameters" in done.stdout, done.stderr
    assert json.loads((tmp_path / "dir" / "config.json").read_text())["model"]["mem_len"] == 16
    done = command("convert", tmp_path / "dir", tmp_path / "back.pth", "--to-torch")
    assert done.returncode == 0 and "wrote 35 tensors" in done.stdout, done.stderr
    assert (tmp_path / "back.pth").exists()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*no\.pth"):
        convert(tmp_path / "no.pth", tmp_path / "dir", config(), auto=True)
    with pytest.raises(UserError, match="no checkpoint at"):
        to_torch(tmp_path, tmp_path / "x.pth")
