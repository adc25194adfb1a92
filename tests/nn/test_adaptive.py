"""Laws of the adaptive embedding and softmax. B batch, L length, D model features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.nn import adaptive
from deq_flax.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

LAYOUTS = {
    "clusters": ((10, 20), 2, 8),
    "shared": ((10, 20), 1, 4),
    "plain": ((), 1, 8),
    "projected": ((), 4, 8),
}
VOCAB_SIZE, D_MODEL = 30, 8


def build(name):
    cutoffs, div_value, d_embed = LAYOUTS[name]
    embedding = AdaptiveEmbedding(VOCAB_SIZE, d_embed, D_MODEL, cutoffs=cutoffs, div_value=div_value, rngs=nnx.Rngs(0))
    softmax = AdaptiveSoftmax(embedding, rngs=nnx.Rngs(1))
    random = np.random.default_rng(0)
    for _, param in nnx.to_flat_state(nnx.state(softmax)):
        param.set_value(jnp.asarray(random.normal(size=param.shape), jnp.float32))
    return embedding, softmax


def batch():
    random = np.random.default_rng(1)
    hidden_BLD = jnp.asarray(random.normal(size=(2, VOCAB_SIZE, D_MODEL)), jnp.float32)
    return hidden_BLD, jnp.asarray(random.permuted([range(VOCAB_SIZE)] * 2, axis=1), jnp.int32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nll_is_that_of_a_distribution_over_the_vocabulary(name):
    graphdef, state = nnx.split(build(name)[1])
    hidden_BLD, targets_BL = batch()
    log_p, nll = jax.jit(lambda s, h, t: (nnx.merge(graphdef, s).log_probabilities(h), nnx.merge(graphdef, s).nll(h, t)))(
        state, hidden_BLD, targets_BL
    )
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    expected = -np.take_along_axis(np.asarray(log_p), np.asarray(targets_BL)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nll, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "max_logits"), [("clusters", 70), ("shared", 300), ("plain", 300)])
def test_chunks_change_neither_values_nor_gradients(name, max_logits, monkeypatch):
    hidden_BLD, targets_BL = batch()
    weights_BL = jnp.asarray(np.random.default_rng(2).uniform(size=targets_BL.shape), jnp.float32)

    def run(limit):
        monkeypatch.setattr(adaptive, "MAX_LOGITS", limit)
        graphdef, state = nnx.split(build(name)[1])
        loss = lambda s, h: jnp.sum(weights_BL * nnx.merge(graphdef, s).nll(h, targets_BL))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, hidden_BLD)

    for whole, chunked in zip(jax.tree.leaves(run(2**25)), jax.tree.leaves(run(max_logits)), strict=True):
        np.testing.assert_allclose(chunked, whole, rtol=2e-4, atol=2e-4)


def test_chunks_never_hold_more_logits_than_allowed(monkeypatch):
    monkeypatch.setattr(adaptive, "MAX_LOGITS", 70)
    graphdef, state = nnx.split(build("clusters")[1])
    hidden_BLD, targets_BL = batch()
    grad = jax.grad(lambda s, h: nnx.merge(graphdef, s).nll(h, targets_BL).sum(), argnums=1)
    hlo = jax.jit(grad).lower(state, hidden_BLD).as_text()
    assert "tensor<7x10xf32>" in hlo
    assert "tensor<60x10xf32>" not in hlo


@pytest.mark.parametrize("every", [16, 4])
def test_a_large_tail_is_computed_for_few_tokens_at_a_time(every):
    """One in `every` of 512 tokens is in the tail: half a chunk of 64, or two. All logits would be 512 x 3000."""
    embedding = AdaptiveEmbedding(3050, 4, 4, cutoffs=(50,), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(AdaptiveSoftmax(embedding, rngs=nnx.Rngs(1)))
    hidden_BLD = jax.random.normal(jax.random.key(0), (8, 64, 4))
    targets_BL = jnp.arange(512).reshape(8, 64) % 50 + 100 * (jnp.arange(64)[None] % every == 3)
    nll = jax.jit(lambda s: nnx.merge(graphdef, s).nll(hidden_BLD, targets_BL))
    hlo = nll.lower(state).as_text()
    assert "tensor<64x3000xf32>" in hlo
    assert "tensor<512x3000xf32>" not in hlo
    log_p = nnx.merge(graphdef, state).log_probabilities(hidden_BLD)
    np.testing.assert_allclose(nll(state), -jnp.take_along_axis(log_p, targets_BL[..., None], axis=-1)[..., 0], rtol=1e-5)

    def nll_of_all(state):
        log_p = nnx.merge(graphdef, state).log_probabilities(hidden_BLD)
        return -jnp.take_along_axis(log_p, targets_BL[..., None], axis=-1).sum()

    for few, whole in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f))(state)) for f in (lambda s: nll(s).sum(), nll_of_all)), strict=True
    ):
        np.testing.assert_allclose(few, whole, rtol=1e-3, atol=1e-4)


def test_a_chunk_that_holds_all_words_of_a_tail_is_taken_without_a_loop():
    """The gradient of a loop over chunks adds to the table's for each of them, be it zeros."""
    embedding = AdaptiveEmbedding(3050, 4, 4, cutoffs=(50,), rngs=nnx.Rngs(0))
    softmax = AdaptiveSoftmax(embedding, rngs=nnx.Rngs(1))
    program = jax.make_jaxpr(softmax.nll)(jnp.ones((8, 64, 4)), jnp.zeros((8, 64), jnp.int32))
    (kept,) = (equation for equation in program.eqns if equation.primitive.name == "remat2")
    (choice,) = (equation for equation in kept.params["jaxpr"].eqns if equation.primitive.name == "cond")
    assert ["scan" in str(branch) for branch in choice.params["branches"]] == [True, False]


def test_the_gradient_keeps_no_copy_of_the_table_for_each_chunk():
    embedding = AdaptiveEmbedding(3050, 4, 4, cutoffs=(50,), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(AdaptiveSoftmax(embedding, rngs=nnx.Rngs(1)))
    hidden_BLD, targets_BL = jnp.ones((8, 64, 4)), jnp.zeros((8, 64), jnp.int32)
    gradient = jax.jit(jax.grad(lambda s: nnx.merge(graphdef, s).nll(hidden_BLD, targets_BL).sum()))
    hlo = gradient.lower(state).as_text()
    assert "tensor<3000x4xf32>" in hlo and "tensor<64x3000xf32>" in hlo
    assert "tensor<8x3000x4xf32>" not in hlo


def test_embedding_looks_each_token_up_in_its_cluster():
    embedding, _ = build("clusters")
    for token, cluster, row in [(0, 0, 0), (9, 0, 9), (10, 1, 0), (29, 2, 9)]:
        x_D = embedding.tables_NE[cluster][...][row] @ embedding.projections_ED[cluster][...] * D_MODEL**0.5
        np.testing.assert_allclose(embedding(jnp.array([[token]]))[0, 0], x_D, rtol=1e-5)


def test_tied_weights_are_one_param():
    embedding, softmax = build("clusters")
    assert all(a is b for a, b in zip(embedding.tables_NE, softmax.tables_NE, strict=True))
    assert [a is b for a, b in zip(embedding.projections_ED, softmax.projections_ED, strict=True)] == [False, True, True]
    embedding, softmax = build("shared")
    assert [embedding.projections_ED[0] is p for p in softmax.projections_ED] == [False, True, True]


@pytest.mark.parametrize(
    ("cutoffs", "d_embed", "div_value", "message"),
    [((20, 10), 8, 2, "increase"), ((10, 30), 8, 2, "increase"), ((0,), 8, 2, "increase"), ((10, 20), 8, 4, "leaves nothing")],
)
def test_wrong_clusters_are_refused(cutoffs, d_embed, div_value, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveEmbedding(30, d_embed, 8, cutoffs=cutoffs, div_value=div_value, rngs=nnx.Rngs(0))
