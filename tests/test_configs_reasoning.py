"""Laws of the reasoning configs: they hold the published values, repeat nothing, and their models take their puzzles."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.config import resolve
from deq_flax.data.puzzles.puzzles import PUZZLES, fingerprints
from deq_flax.data.puzzles.sudoku import sudokus, symmetric_key
from deq_flax.models import abstract_model
from tests.test_configs import load, repeated

REASONING = {name: load(name) for name in ("prefix_sums", "state_tracking", "maze", "sudoku")}
VARIANTS = [(name, variant) for name, module in REASONING.items() for variant in getattr(module, "VARIANTS", [None])]


def resolved(name, variant):
    return resolve(REASONING[name].get_config(*([] if variant is None else [variant])).to_dict())


@pytest.mark.parametrize("name", REASONING)
def test_a_config_file_repeats_no_default(name):
    assert repeated(REASONING[name]) == []


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_model_of_a_config_takes_its_puzzles(name, variant):
    """Of every size, by shapes alone."""
    config = resolved(name, variant)
    inputs, outputs = PUZZLES[config.data.name].symbols(config.data.size)
    options = dataclasses.replace(config.model, input_symbols=inputs, output_symbols=outputs)
    graphdef, state = nnx.split(abstract_model(options))
    axes = 1 if name in ("prefix_sums", "state_tracking") else 2

    def logits(state, inputs):
        model = nnx.merge(graphdef, state)
        f, z0, _ = model.equation(inputs)
        return model.answer(f(z0))[0]

    for size in (config.data.size, *config.data.test_sizes):
        shape = jax.ShapeDtypeStruct((2, *(size,) * axes), jnp.int32)
        assert jax.eval_shape(logits, state, shape).shape == (*shape.shape, outputs)
    assert config.optimizer.warmup_steps < config.train.steps
    assert config.data.size not in config.data.test_sizes


PUBLISHED = [("maze", "unique_eqr"), ("maze", "unique_trm"), ("sudoku", "extreme_eqr"), ("sudoku", "extreme_trm")]


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_the_published_recipes(name, variant):
    config = resolved(name, variant)
    model, deq, loss, optimizer, train, data = (
        getattr(config, part) for part in ("model", "deq", "loss", "optimizer", "train", "data")
    )
    eqr, maze = variant.endswith("eqr"), name == "maze"
    assert (
        (model.width, model.blocks, model.low_steps, model.mixer) == (128, 1, 4, "attention") if maze else (512, 2, 6, "cells")
    )
    assert (model.initial, model.relaxation) == (("normal", 0.95) if eqr else ("zero", 1.0))
    gradient = deq.training_gradient()
    assert (gradient.steps, gradient.last, gradient.noise) == (3, 1, 0.01 if eqr else 0.0) and deq.eval_unrolled
    assert (loss.segments, loss.halt_weight, loss.halt_exploration, loss.cross_entropy) == (16, 0.5, 0.1, "stablemax")
    assert (optimizer.learning_rate, optimizer.beta2, optimizer.weight_decay, optimizer.warmup_steps) == (1e-4, 0.95, 1.0, 2000)
    assert (optimizer.schedule, train.ema_decay, data.batch_size) == ("constant", 0.999, 768)
    assert train.steps == (100_000 if maze else 50_000) and data.train_examples == 1000
    if maze:
        assert (data.size, data.path_lengths, data.test_examples) == (30, (100, 140), 1000)


@pytest.mark.parametrize(("variant", "millions"), [("extreme_eqr", 5.0)])
def test_the_size_is_the_published_one(variant, millions):
    """TRM's network with the mixer over cells has about five million parameters."""
    options = dataclasses.replace(resolved("sudoku", variant).model, input_symbols=10, output_symbols=10)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract_model(options), nnx.Param)))
    assert abs(count / 1e6 - millions) < 0.2


def test_small_boards_are_many_different_ones():
    """Splits go by what symmetries leave as it is: with few different boards, a test set would be two or three of them."""

    def different(clues):
        inputs, *_ = sudokus(4, 2000, np.random.default_rng(0), clues=clues)
        return len(np.unique(fingerprints(symmetric_key(inputs))))

    assert different(resolved("sudoku", "four").data.clues) > 80 and different(0) < 25
