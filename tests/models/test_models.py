"""The table of models: every model has its interface, an abstract form, and sharding metadata."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from deq_flax.equilibrium import Unroll
from deq_flax.errors import UserError
from deq_flax.models import MODELS, abstract_model, build_model
from deq_flax.models.language_model import TransformerOptions
from deq_flax.models.mdeq import MDEQOptions
from deq_flax.models.model import (
    ImageModel,
    ImageOutput,
    LanguageModel,
    LanguageOutput,
    ModelOptions,
    PuzzleModel,
    PuzzleOutput,
)
from tests.cases import others_slow
from tests.reference import parameters, solving

SMALL_TRANSFORMER = dict(
    vocab_size=50, d_model=16, d_embed=16, n_head=2, d_head=4, d_inner=24, cutoffs=(20,), div_value=2, mem_len=4
)
SMALL = {
    "deq_transformer": SMALL_TRANSFORMER,
    "transformer_xl": SMALL_TRANSFORMER,
    "proposal_deq": SMALL_TRANSFORMER | dict(proposal_blocks=1),
    "mdeq": dict(num_classes=10, channels=(4, 8), head_channels=(2, 2), final_channels=6, expansion=2, groups=2),
    "conv_reasoner": dict(input_symbols=6, output_symbols=3, width=4, halting=True),
    "attention_reasoner": dict(input_symbols=6, output_symbols=3, width=4, halting=True),
    "two_level_reasoner": dict(input_symbols=6, output_symbols=3, width=4, low_steps=1, halting=True),
}


def options(name, **changed):
    return MODELS[name].Options(**{"name": name} | SMALL[name] | changed)


@pytest.mark.parametrize(
    "name",
    others_slow(MODELS, [name for name in MODELS if name.endswith("reasoner")]),
)
def test_every_model_has_the_interface_of_its_kind(name):
    model = build_model(options(name), rngs=nnx.Rngs(0))
    given = dict(solve=solving(gradient=Unroll(2)), key=jax.random.key(0))
    call = nnx.jit(lambda model, *inputs: model(*inputs, **given))
    if model.kind == "language":
        assert isinstance(model, LanguageModel)
        tokens_BL = jnp.arange(6).reshape(2, 3)
        inputs = tokens_BL, model.fresh_memory(2)
        out = call(model, *inputs)
        assert isinstance(out, LanguageOutput)
        assert jax.tree.map(jnp.shape, out.memory) == jax.tree.map(jnp.shape, model.fresh_memory(2))
        assert model.nll(out.hidden_BLD, tokens_BL).shape == (2, 3)
        assert model.log_probabilities(out.hidden_BLD).shape == (2, 3, 50)
        again, emptied = call(model, tokens_BL, out.memory), out.memory._replace(length_B=jnp.zeros(2, jnp.int32))
        np.testing.assert_array_equal(call(model, tokens_BL, emptied).hidden_BLD, out.hidden_BLD)
        assert np.abs(again.hidden_BLD - out.hidden_BLD).max() > 0
    elif model.kind == "puzzle":
        assert isinstance(model, PuzzleModel)
        tokens_BL = jnp.arange(6).reshape(2, 3)
        out, inputs = call(model, tokens_BL), (tokens_BL,)
        assert isinstance(out, PuzzleOutput) and out.logits.shape == (2, 3, 3) and out.halt_B.shape == (2,)
        assert jax.tree.map(jnp.shape, out.state) == jax.tree.map(jnp.shape, model.initial_state(tokens_BL))
    else:
        assert isinstance(model, ImageModel)
        images_BHWC = jnp.ones((2, 8, 8, 3))
        out, inputs = call(model, images_BHWC), (images_BHWC,)
        assert isinstance(out, ImageOutput) and out.logits.shape == (2, 10)
    assert model.has_equilibrium == hasattr(model, "equation") == (out.stats is not None)
    if model.has_equilibrium:
        f, z0, *_ = model.equation(*inputs)
        assert jax.tree.map(jnp.shape, jax.eval_shape(f, z0)) == jax.tree.map(jnp.shape, z0)


@pytest.mark.parametrize("name", others_slow(MODELS, MODELS.keys() - {"mdeq"}))
def test_an_abstract_model_has_the_shapes_and_the_structure_of_the_real_one(name):
    (graphdef, state), (abstract_graphdef, abstract) = (
        nnx.split(model) for model in (build_model(options(name), rngs=nnx.Rngs(0)), abstract_model(options(name)))
    )
    assert graphdef == abstract_graphdef and hash(graphdef) == hash(abstract_graphdef)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


SIZES = dict(d_model=8, d_embed=8, n_head=2, d_head=4, d_inner=8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ModelOptions(name="rnn"), "unknown model.name 'rnn'; known: deq_transformer, transformer_xl, proposal_deq, mdeq"),
        (TransformerOptions(**SIZES), "section model: vocab_size must be at least 1"),
        (
            TransformerOptions(**SIZES, vocab_size=50, cutoffs=(60,)),
            r"section model: cutoffs must increase strictly within \(0, 50\)",
        ),
        (
            MDEQOptions(num_classes=3, channels=(8, 12), head_channels=(2, 2), final_channels=8),
            "section model: 60 channels cannot be divided into 8 groups",
        ),
    ],
)
def test_an_impossible_model_is_refused_in_one_line(wrong, message):
    with pytest.raises(UserError, match=message):
        abstract_model(wrong)


@pytest.mark.parametrize("name", MODELS)
def test_options_begin_with_the_name_and_take_lists_for_tuples(name):
    made = options(name)
    assert next(field.name for field in dataclasses.fields(made)) == "name" and made.name == name
    as_lists = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(made).items()}
    tuples = [field for field in dataclasses.fields(made) if "tuple" in str(field.type)]
    assert len(tuples) == sum(isinstance(value, list) for value in as_lists.values())
    assert type(made)(**as_lists) == made and hash(type(made)(**as_lists)) == hash(made)


TRANSFORMER_SPLIT = {
    "relative/v_IO": (None, "tensor"),
    "relative/g_O": ("tensor",),
    "out/v_IO": ("tensor", None),
    "inner/v_IO": (None, "tensor"),
    "inner/g_O": ("tensor",),
    "inner/bias_O": ("tensor",),
    "outer/v_IO": ("tensor", None),
}
PLAIN_SPLIT = {
    "relative/weight_IO": (None, "tensor"),
    "out/weight_IO": ("tensor", None),
    "inner/weight_IO": (None, "tensor"),
    "inner/bias_O": ("tensor",),
    "outer/weight_IO": ("tensor", None),
}


@pytest.mark.parametrize(
    ("name", "changed", "places", "split"),
    [
        ("deq_transformer", {}, ["cell"], TRANSFORMER_SPLIT),
        ("deq_transformer", {"weight_norm": False}, ["cell"], PLAIN_SPLIT),
        ("deq_transformer", {"blocks": 2}, ["cell/blocks/0", "cell/blocks/1"], TRANSFORMER_SPLIT),
        ("transformer_xl", {"blocks": 2}, ["cells/0", "cells/1"], TRANSFORMER_SPLIT),
        ("proposal_deq", {}, ["cells/0", "cells/1"], TRANSFORMER_SPLIT),
        ("mdeq", {}, [], {}),
    ],
)
def test_params_carry_the_axes_that_tensor_may_split(name, changed, places, split):
    """The paired kernels of feed-forward and attention are split; qkv is not, as its parts would not hold whole heads."""
    expected = {f"{place}/{path}": axes for place in places for path, axes in split.items()}
    for model in (build_model(options(name, **changed), rngs=nnx.Rngs(0)), abstract_model(options(name, **changed))):
        found = {path: param.get_metadata().get("out_sharding") for path, param in parameters(model).items()}
        assert {path: axes for path, axes in found.items() if axes} == expected
        again = nnx.merge(*nnx.split(model), copy=True)
        assert {path: param.get_metadata().get("out_sharding") for path, param in parameters(again).items()} == found


@pytest.mark.slow
def test_metadata_works_in_jit_under_a_mesh_and_in_a_shard_map():
    """The metadata places no arrays: that is left to the trainer."""
    graphdef, state = nnx.split(build_model(options("deq_transformer"), rngs=nnx.Rngs(0)))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens_BL = jnp.arange(12).reshape(4, 3)

    def hidden(state, tokens_BL):
        model = nnx.merge(graphdef, state, copy=True)
        memory = model.fresh_memory(tokens_BL.shape[0])
        return model(tokens_BL, memory, solve=solving(gradient=Unroll(2))).hidden_BLD

    expected = jax.jit(hidden)(state, tokens_BL)
    by_shards = jax.shard_map(
        hidden, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"}, check_vma=False
    )
    with jax.set_mesh(mesh):
        for function in (hidden, by_shards):
            np.testing.assert_allclose(jax.jit(function)(state, tokens_BL), expected, atol=1e-5)
        made = jax.jit(lambda: nnx.state(build_model(options("deq_transformer"), rngs=nnx.Rngs(0))))()
    assert jax.tree.structure(made) == jax.tree.structure(state)


def test_the_table_needs_only_jax_and_flax():
    program = "import flax.nnx, sys; before = set(sys.modules); import deq_flax.models; print(*set(sys.modules) - before)"
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    added = {module.split(".")[0] for module in result.stdout.split()}
    assert added - set(sys.stdlib_module_names) <= {"deq_flax", "jax", "flax", "numpy"}
