"""Laws of the Transformer-XL, the explicit counterpart of the DEQ-Transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.models.language_model import TransformerOptions
from deq_flax.models.transformer_xl import TransformerXL
from deq_flax.nn.attention import position_encoding
from deq_flax.nn.transformer import Memory
from tests.cases import others_slow

SIZES = dict(vocab_size=50, d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=24, cutoffs=(20,), div_value=2)
SMALL = SIZES | dict(mem_len=0, dropout=0.0)


def build(blocks=3, **options):
    """A model with kernels large enough for every layer to matter."""
    model = TransformerXL(TransformerOptions(**SMALL | dict(blocks=blocks) | options), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(random.normal(scale=0.3, size=x.shape), x.dtype), state)
    return nnx.merge(graphdef, state)


def tokens(length=12):
    return jnp.asarray(np.random.default_rng(1).integers(0, 50, (2, length)), jnp.int32)


@nnx.jit
def call(model, tokens_BL, memory, key=None):
    return model(tokens_BL, memory, key=key)


OPTIONS = [{"weight_norm": False}, {"pre_norm": True, "affine_norm": True}]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", others_slow(OPTIONS, OPTIONS[:1]))
def test_segments_with_enough_memory_equal_the_whole(options):
    """Each layer's memory holds the inputs of that layer, so cutting a text loses nothing."""
    model = build(mem_len=12, **options)
    whole = call(model, tokens(), model.fresh_memory(2)).hidden_BLD
    memory, parts = model.fresh_memory(2), []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        output = call(model, tokens()[:, start:end], memory)
        memory = output.memory
        parts.append(output.hidden_BLD)
    close(jnp.concatenate(parts, axis=1), whole)
    assert memory.states_BNMD.shape == (2, 3, 12, 16) and memory.length_B.tolist() == [12, 12]
    forgetful = build(mem_len=2, **options)
    memory = call(forgetful, tokens()[:, :6], forgetful.fresh_memory(2)).memory
    assert np.abs(call(forgetful, tokens()[:, 6:], memory).hidden_BLD - whole[:, 6:]).max() > 1e-3


@pytest.mark.slow
def test_layers_are_the_cells_of_a_deq_transformer_in_sequence():
    """Without memory, the output is the embeddings passed through each cell, with nothing injected."""
    model = build(weight_norm=False)
    x = model.embed(tokens())
    nothing = Memory(jnp.zeros((2, 0, 16)), jnp.zeros((2, 0, 48)), jnp.zeros(2, jnp.int32))
    for cell in model.cells:
        x = cell(x, jnp.zeros((2, 12, 48)), nothing, position_encoding(12, 16))
    close(model(tokens(), model.fresh_memory(2)).hidden_BLD, x)


def test_later_tokens_do_not_affect_earlier_states():
    model = build(mem_len=4)
    a, b = (call(model, x, model.fresh_memory(2)).hidden_BLD for x in (tokens(), tokens().at[:, 7].set(tokens()[:, 7] ^ 1)))
    close(a[:, :7], b[:, :7])
    assert np.abs(a[:, 7:] - b[:, 7:]).min() > 0


@pytest.mark.slow
def test_invalid_memory_is_not_attended_to():
    model = build(mem_len=4)
    memory = model.fresh_memory(2)
    poisoned = memory._replace(states_BNMD=memory.states_BNMD + 3.0)
    close(call(model, tokens(), poisoned).hidden_BLD, call(model, tokens(), memory).hidden_BLD)


def test_dropout_needs_a_key_and_follows_it():
    model = build(mem_len=4, dropout=0.5, attention_dropout=0.5)
    memory = model.fresh_memory(2)
    dry, a, b, again = (call(model, tokens(), memory, k).hidden_BLD for k in (None, *map(jax.random.key, (0, 1, 0))))
    assert np.array_equal(a, again) and not np.array_equal(a, b) and not np.array_equal(a, dry)


def test_options_out_of_range_are_refused():
    for options, word in (({"blocks": 0}, "blocks"), ({"mem_len": -1}, "mem_len"), ({"output_dropout": "x"}, "tokens")):
        with pytest.raises(ValueError, match=word):
            TransformerXL(TransformerOptions(**SMALL | options), rngs=nnx.Rngs(0))
