"""Laws of the model that refines a proposal; its explicit part and its limits are those of the Transformer-XL."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.equilibrium import Implicit, Picard, Unroll
from deq_flax.models import generation
from deq_flax.models.deq_transformer import DEQTransformer
from deq_flax.models.generation import Generator, Sampling
from deq_flax.models.language_model import TransformerOptions
from deq_flax.models.layers import LayerMemory, fresh_memory, layer_contexts
from deq_flax.models.proposal_deq import ProposalDEQ, ProposalOptions
from deq_flax.models.transformer_xl import TransformerXL
from deq_flax.nn.transformer import Memory
from tests.reference import QUICK_COMPILE, solving

SIZES = dict(vocab_size=50, d_model=16, d_embed=16, n_head=2, d_head=8, d_inner=24, cutoffs=(20,), div_value=2)
BLOCK = dict(pre_norm=True, affine_norm=True, weight_norm=False)
TODAY = dict(norm="rms", positions="rotary", gated=True)
TIGHT = Picard(tol=1e-7, max_steps=100)
jit = partial(jax.jit, compiler_options=QUICK_COMPILE)


def randomized(model):
    """The model with kernels large enough for every layer to matter, and small enough for f to contract."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(random.normal(scale=0.3, size=x.shape), x.dtype), params)
    return nnx.merge(graphdef, params, rest)


def build(scale_D=0.4, **options):
    options = SIZES | BLOCK | dict(mem_len=0, proposal_blocks=2) | options
    model = randomized(ProposalDEQ(ProposalOptions(**options), rngs=nnx.Rngs(0)))
    model.scale_D[...] = jnp.full((16,), scale_D)
    return model


def explicit(blocks, model, **options):
    """The Transformer-XL of the first `blocks` layers of a model."""
    other = TransformerXL(TransformerOptions(**SIZES | BLOCK | dict(mem_len=0, blocks=blocks) | options), rngs=nnx.Rngs(0))
    other.cells = nnx.List(list(model.cells)[:blocks])
    other.embedding, other.softmax = model.embedding, model.softmax
    return other


def tokens(length=12):
    return jnp.asarray(np.random.default_rng(1).integers(0, 50, (2, length)), jnp.int32)


@partial(jit, static_argnums=(0, 4, 5))
def run(graphdef, state, tokens_BL, memory, solver=TIGHT, gradient=None):
    return nnx.merge(graphdef, state)(tokens_BL, memory, solve=solving(solver=solver, gradient=gradient))


def hidden(model, gradient=None, x=None):
    return run(*nnx.split(model), tokens() if x is None else x, model.fresh_memory(2), TIGHT, gradient)


def close(a, b, error=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=error)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, TODAY | dict(scale_D=0.1)])
def test_segments_with_enough_memory_equal_the_whole(options):
    """The memory of each block in f holds what it sees at the equilibrium, and later tokens do not change earlier states."""
    model = build(mem_len=12, proposal_blocks=1, blocks=2, **options)
    whole = hidden(model)
    assert whole.stats.converged.all() and whole.stats.nfe > 5
    memory, parts = model.fresh_memory(2), []
    for piece in jnp.split(tokens(), 2, axis=1):
        output = run(*nnx.split(model), piece, memory)
        memory = output.memory
        parts.append(output.hidden_BLD)
    close(jnp.concatenate(parts, axis=1), whole.hidden_BLD)
    for a, b in zip(memory, whole.memory, strict=True):
        close(a, b)


@pytest.mark.slow
def test_without_updates_it_is_its_explicit_blocks():
    model = build(scale_D=0.0)
    out = hidden(model)
    close(out.hidden_BLD, hidden(explicit(2, model)).hidden_BLD)
    assert out.stats.nfe == 1 and out.stats.relative_residual.max() == 0


def test_without_injection_one_evaluation_is_a_transformer_of_all_blocks():
    model = build(scale_D=1.0, proposal_blocks=0, blocks=2, inject_proposal=False)
    close(hidden(model, Unroll(1)).hidden_BLD, hidden(explicit(2, model)).hidden_BLD)


@pytest.mark.slow
def test_without_injection_the_equilibrium_is_that_of_a_deq_transformer_without_one():
    """Whatever the scale: it only relaxes the iteration. Tokens are then the start, and no part of what is solved."""
    kind = dict(pre_norm=True, affine_norm=False, mem_len=4)
    model = build(scale_D=0.5, proposal_blocks=0, inject_proposal=False, **kind)
    bias_D = model.cells[0].outer.bias_O
    bias_D[...] = 4 * jnp.asarray(np.random.default_rng(4).normal(size=16), jnp.float32)  # f contracts: one equilibrium
    other = DEQTransformer(TransformerOptions(**SIZES | BLOCK | kind), rngs=nnx.Rngs(0))
    other.cell, other.embedding, other.softmax = model.cells[0], model.embedding, model.softmax
    for param in (other.injection.weight_IO, other.injection.bias_O):
        param[...] = jnp.zeros_like(param[...])
    states = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 16)), jnp.float32)
    valid = jnp.full((2,), 4, jnp.int32)
    found = run(*nnx.split(model), tokens(), LayerMemory(states[:, None], valid))
    expected = run(*nnx.split(other), tokens(), Memory(states, jnp.zeros((2, 4, 48)), valid))
    assert found.stats.converged.all() and expected.stats.converged.all() and found.stats.nfe > expected.stats.nfe > 5
    close(found.hidden_BLD, expected.hidden_BLD)
    assert expected.hidden_BLD.std(axis=1).mean() > 0.01, "the memory is seen"


def test_the_equation_starts_at_the_proposal_and_holds_it_in_every_evaluation():
    """f(z, c) - c is what the last block adds to z + c, times the scale."""
    model = build()
    z = jnp.asarray(np.random.default_rng(2).normal(size=(2, 12, 16)), jnp.float32)

    @jit
    def evaluated(z):
        f, c, _ = model.equation(tokens(), model.fresh_memory(2))
        (context,) = layer_contexts(model.cells[2:], c, fresh_memory(model.cells[2:], 2, 0, c.dtype), [None])
        return c, f(z), c + 0.4 * (model.cells[2].evaluate(z + c, context) - (z + c))

    c, found, by_hand = evaluated(z)
    close(found, by_hand)
    close(c, hidden(explicit(2, model)).hidden_BLD)


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_agree_with_a_long_unrolled_iteration():
    model = build(cutoffs=(), div_value=1, proposal_blocks=1)
    graphdef, params = nnx.split(model)

    def loss(params, gradient):
        model = nnx.merge(graphdef, params)
        out = model(tokens(), model.fresh_memory(2), solve=solving(solver=TIGHT, gradient=gradient))
        return model.nll(out.hidden_BLD, tokens()).mean()

    exact, unrolled = jit(lambda p: [jax.grad(loss)(p, gradient) for gradient in (Implicit(), Unroll(60))])(params)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))
        assert np.abs(b).max() > 0


def test_dropout_needs_a_key_and_follows_it():
    model = build(proposal_blocks=1, dropout=0.3, attention_dropout=0.3)

    @jit
    def proposals(keys):
        dry = model.equation(tokens(), model.fresh_memory(2)).f(jnp.ones((2, 12, 16)))
        return dry, jax.lax.map(lambda key: model.equation(tokens(), model.fresh_memory(2), key).f(jnp.ones((2, 12, 16))), keys)

    dry, (a, b, again) = proposals(jnp.stack([*map(jax.random.key, (0, 1, 0))]))
    assert np.array_equal(a, again) and not np.array_equal(a, b) and not np.array_equal(a, dry)


@pytest.mark.slow
def test_greedy_text_is_the_argmax_of_a_full_forward_pass(monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 1)  # one program for prompt and text
    model, prompt = build(proposal_blocks=1, mem_len=4), np.array([5, 17, 30, 5, 49])
    generator = Generator(model, solver=TIGHT, sampling=Sampling(), memory=30)
    written = [int(token) for (token,), _ in generator.tokens([prompt], 8)]
    text = np.concatenate([prompt, written])[None]
    whole = model.log_probabilities(run(*nnx.split(model), text, model.fresh_memory(1)).hidden_BLD)
    assert written == np.argmax(whole[0], axis=-1)[len(prompt) - 1 : -1].tolist()


def test_a_negative_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match="proposal_blocks must not be negative"):
        ProposalOptions(**SIZES, proposal_blocks=-1)
