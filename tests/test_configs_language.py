"""Laws of the configs: one set of keys, the published values, locked."""

import importlib.util
import math
from pathlib import Path

import jax
import pytest
from flax import nnx

from deq_flax.models.deq_transformer import DEQTransformer
from deq_flax.models.transformer_xl import TransformerXL

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LANGUAGE = {name: load(name) for name in ("wt103", "ptb")}
VARIANTS = [(name, variant) for name, module in LANGUAGE.items() for variant in module.VARIANTS]

KEYS = {
    "data": "name path cache batch_size seq_len eval_batch_size eval_seq_len",
    "model": "vocab_size d_model d_embed n_head d_head d_inner blocks cutoffs div_value pre_norm affine_norm weight_norm "
    "mem_len local_size dropout attention_dropout output_dropout dtype",
    "deq": "solver tol max_steps stop memory gradient phantom_steps phantom_damping backward_solver backward_tol "
    "backward_max_steps jacobian_weight jacobian_frequency pretrain_jacobian_weight "
    "jacobian_increment jacobian_increment_every jacobian_stop jacobian_through_equilibrium max_steps_jitter pretrain_steps "
    "pretrain_layers",
    "optimizer": "name learning_rate warmup_steps schedule clip_norm weight_decay momentum nesterov",
    "train": "steps seed log_every eval_every checkpoint_every accumulate ema_decay max_skipped",
    "eval": "spectral_radius max_steps_sweep",
    "mesh": "data fsdp tensor",
    "checkpoint": "keep_latest keep_best init_from",
}


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_has_the_keys_of_every_language_config(name, variant):
    config = LANGUAGE[name].get_config(variant).to_dict()
    assert config.pop("task") == ("explicit_language" if variant == "explicit" else "language")
    expected = {s: set(k.split()) for s, k in KEYS.items() if s != "deq" or variant != "explicit"}
    assert {section: set(values) for section, values in config.items()} == expected
    types = [(s, k, type(v)) for s, values in config.items() for k, v in values.items()]
    base = LANGUAGE["wt103"].get_config().to_dict()
    assert types == [(s, k, type(base[s][k])) for s, k, _ in types]


@pytest.mark.parametrize("name", LANGUAGE)
def test_misspelled_keys_and_variants_fail(name):
    config = LANGUAGE[name].get_config()
    with pytest.raises(KeyError, match="Did you mean"):
        config.train["stepss"] = 3
    with pytest.raises(ValueError, match="known: base"):
        LANGUAGE[name].get_config("bass")


# d_inner, memory, pre-norm, solvers and limits, jitter, dropout, Jacobian weight, frequency, period, pretraining
PUBLISHED = {
    "base": (48_000, 150, False, "anderson", 30, "broyden", 35, 0, 0.05, 0.0, 0.0, 0.0, 0, 32_000, False),
    "reg": (48_000, 300, False, "anderson", 12, "broyden", 13, 2, 0.06, 0.01, 1.9, 0.35, 35_000, 32_000, False),
    "preln_reg": (48_000, 300, True, "anderson", 14, "broyden", 14, 2, 0.06, 0.01, 2.0, 0.4, 30_000, 32_000, False),
    "ift": (48_000, 150, False, "broyden", 35, "broyden", 35, 0, 0.05, 0.0, 0.0, 0.0, 0, 0, True),
    "ift_jr": (48_000, 150, False, "broyden", 35, "broyden", 35, 0, 0.05, 0.0, 0.1, 0.4, 30_000, 0, True),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_wt103_is_the_published_recipe(variant):
    config = LANGUAGE["wt103"].get_config(variant)
    model, deq, optimizer, data = config.model, config.deq, config.optimizer, config.data
    solvers = (deq.solver, deq.max_steps, deq.backward_solver, deq.backward_max_steps, deq.max_steps_jitter)
    dropout = (model.dropout, model.attention_dropout)
    jacobian = (deq.jacobian_weight, deq.jacobian_frequency, deq.jacobian_increment_every)
    last = (deq.pretrain_steps, deq.jacobian_through_equilibrium)
    assert (model.d_inner, model.mem_len, model.pre_norm, *solvers, *dropout, *jacobian, *last) == PUBLISHED[variant]
    assert (model.cutoffs, model.div_value) == ((20_000, 40_000, 200_000), 4)
    assert (model.d_model, model.d_embed, model.n_head, model.d_head, model.weight_norm) == (700, 700, 10, 70, True)
    assert (deq.tol, deq.backward_tol, deq.stop, deq.pretrain_layers, deq.jacobian_increment) == (
        1e-3,
        1e-3,
        "relative",
        2,
        0.1,
    )
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule, optimizer.clip_norm) == (
        "adam",
        2.5e-4,
        "cosine",
        0.25,
    )
    assert (optimizer.warmup_steps, config.train.steps) == (16_000, 300_000)
    assert (data.batch_size, data.seq_len, data.eval_batch_size, data.eval_seq_len) == (56, 150, 16, 150)


def test_deq_lm_is_the_published_recipe():
    config = LANGUAGE["wt103"].get_config("deq_lm")
    model, deq = config.model, config.deq
    assert (model.d_inner, model.blocks, model.pre_norm, model.affine_norm, model.mem_len) == (14_800, 3, True, True, 150)
    assert (deq.gradient, deq.solver, deq.max_steps, deq.pretrain_steps, deq.jacobian_weight) == ("unroll", "picard", 12, 0, 0)
    assert (config.optimizer.warmup_steps, config.train.steps) == (8_000, 150_000)


def parameters(name, variant, words):
    config = LANGUAGE[name].get_config(variant)
    model_type = TransformerXL if variant == "explicit" else DEQTransformer
    options = config.model.to_dict() | {"vocab_size": words}
    model = nnx.eval_shape(lambda: model_type(**options, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(("name", "words", "millions"), [("wt103", 267_735, 98), ("ptb", 10_000, 24)])
def test_sizes_are_as_stated(name, words, millions):
    """Those of the models that are compared with `base` too."""
    base = parameters(name, "base", words)
    assert round(base / 1e6) == millions
    for variant in {"deq_lm", "explicit", "reversible", "ift"} & set(LANGUAGE[name].VARIANTS):
        assert abs(parameters(name, variant, words) / base - 1) < 2e-3, variant


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_phases_follow_one_another(name, variant):
    config = LANGUAGE[name].get_config(variant)
    assert 0 <= config.optimizer.warmup_steps < config.train.steps
    if "deq" in config:
        assert config.deq.pretrain_steps < config.train.steps
    assert list(config.model.cutoffs) == sorted(config.model.cutoffs)
