"""Laws of the language configs: they hold the published values, repeat nothing, and are locked."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import jax
import pytest
from flax import nnx

from deq_flax.config import resolve, section_types
from deq_flax.models import abstract_model

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(f"configs_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LANGUAGE = {name: load(name) for name in ("wt103", "ptb", "text")}
VARIANTS = [(name, variant) for name, module in LANGUAGE.items() for variant in module.VARIANTS]


def resolved(name, variant):
    return resolve(LANGUAGE[name].get_config(variant).to_dict())


@pytest.mark.parametrize("name", LANGUAGE)
def test_configs_are_locked_and_unknown_variants_fail(name):
    config = LANGUAGE[name].get_config()
    with pytest.raises(KeyError, match="Did you mean"):
        config.train["stepss"] = 3
    with pytest.raises(ValueError, match="known: base"):
        LANGUAGE[name].get_config("bass")


def repeated(module):
    """The keys of a config file that repeat a default, and those of a variant that repeat its base."""
    defaults = {}
    for section, cls in section_types(module.BASE).items():
        defaults |= {f"{section}.{field.name}": field.default for field in dataclasses.fields(cls)}
    del defaults["model.name"]  # it chooses the dataclass
    base = {
        f"{section}.{key}": value for section, part in module.BASE.items() if section != "task" for key, value in part.items()
    }
    found = [key for key, value in base.items() if value == defaults.get(key, dataclasses.MISSING)]
    for variant, changes in getattr(module, "VARIANTS", {}).items():
        found += [f"{variant}: {key}" for key, value in changes.items() if (defaults | base).get(key, "") == value]
    return found


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_config_file_repeats_no_default(name):
    assert repeated(LANGUAGE[name]) == []


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
    config = resolved("wt103", variant)
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
    config = resolved("wt103", "deq_lm")
    model, deq = config.model, config.deq
    assert (model.d_inner, model.blocks, model.pre_norm, model.affine_norm, model.mem_len) == (14_800, 3, True, True, 150)
    assert (deq.gradient, deq.solver, deq.max_steps, deq.pretrain_steps, deq.jacobian_weight) == ("unroll", "picard", 12, 0, 0)
    assert (config.optimizer.warmup_steps, config.train.steps) == (8_000, 150_000)


def parameters(name, variant, vocab_size):
    model = abstract_model(dataclasses.replace(resolved(name, variant).model, vocab_size=vocab_size))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(("name", "vocab_size", "millions"), [("wt103", 267_735, 98), ("ptb", 10_000, 24)])
def test_sizes_are_as_stated(name, vocab_size, millions):
    """Parameter counts of `base`, and of the variants that are compared with it."""
    base = parameters(name, "base", vocab_size)
    assert round(base / 1e6) == millions
    for variant in {"deq_lm", "explicit", "proposal", "reversible", "ift"} & set(LANGUAGE[name].VARIANTS):
        assert abs(parameters(name, variant, vocab_size) / base - 1) < 2e-3, variant


def test_sizes_of_text_models_are_as_stated():
    base = parameters("text", "base", 8_000)
    assert round(base / 1e5) == 52 and round(parameters("text", "large", 32_768) / 1e6) == 134
    assert abs(parameters("text", "explicit", 8_000) / base - 1) < 2e-3


def test_sizes_of_the_tiny_models_are_equal():
    base = parameters("wt103", "tiny", 3_000)
    for variant in ("tiny_explicit", "tiny_proposal"):
        assert abs(parameters("wt103", variant, 3_000) / base - 1) < 2e-3, variant


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_warmup_and_pretraining_end_within_the_run(name, variant):
    config = resolved(name, variant)
    assert 0 <= config.optimizer.warmup_steps < config.train.steps
    assert (config.deq is None) == variant.endswith("explicit") == (config.model.name == "transformer_xl")
    if config.deq:
        assert config.deq.pretrain_steps < config.train.steps
    assert list(config.model.cutoffs) == sorted(config.model.cutoffs)
