"""Laws of the DEQ-Transformer that need no reference numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.equilibrium import Picard, Unroll, fixed_point, jacobian_loss
from deq_flax.models.deq_transformer import DEQTransformer
from deq_flax.models.language_model import TransformerOptions
from tests import reference
from tests.cases import others_slow
from tests.reference import solving

SOLVER = Picard(tol=1e-6, max_steps=200)
jit = partial(jax.jit, compiler_options=reference.QUICK_COMPILE)


def build(pre_norm=False, **options):
    """A small model with weights of the authors' code, which contract enough for tight solves."""
    return reference.build("lm_deq_preln" if pre_norm else "lm_deq_postln", wide=False, **options)


def tokens(length=8):
    return jnp.asarray(np.random.default_rng(0).integers(0, 1000, (2, length)), jnp.int32)


@partial(jit, static_argnums=(0, 4, 5))
def run(graphdef, state, tokens_BL, memory, solver=SOLVER, gradient=None, key=None, max_steps=None, jacobian_key=None):
    model = nnx.merge(graphdef, state)
    solve = solving(solver=solver, gradient=gradient, max_steps=max_steps, jacobian_key=jacobian_key)
    return model(tokens_BL, memory, solve=solve, key=key)


def close(a, b, error=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=error)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_fresh_memory_is_no_memory(pre_norm):
    with_memory, without = (nnx.split(build(pre_norm, mem_len=n)) for n in (5, 0))
    outs = [run(*split, tokens(), nnx.merge(*split).fresh_memory(2)) for split in (with_memory, without)]
    close(outs[0].hidden_BLD, outs[1].hidden_BLD)
    assert outs[0].memory.states_BMD.shape == (2, 5, 32)
    assert outs[1].memory.states_BMD.shape == (2, 0, 32)
    assert outs[0].memory.length_B.tolist() == [5, 5]


def test_later_tokens_do_not_affect_earlier_states():
    model = build(mem_len=4)
    changed = tokens().at[:, 5].set(1)
    a, b = (run(*nnx.split(model), x, model.fresh_memory(2)).hidden_BLD for x in (tokens(), changed))
    close(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).min() > 0


@pytest.mark.parametrize("pre_norm", others_slow([False, True], [False]))
def test_segments_with_enough_memory_equal_the_whole(pre_norm):
    model = build(pre_norm, mem_len=8)
    split = nnx.split(model)
    whole = run(*split, tokens(12), model.fresh_memory(2)).hidden_BLD
    memory, pieces = model.fresh_memory(2), []
    for piece in jnp.split(tokens(12), 3, axis=1):
        out = run(*split, piece, memory)
        memory, pieces = out.memory, [*pieces, out.hidden_BLD]
    close(jnp.concatenate(pieces, axis=1), whole, 1e-4)


def test_masks_are_drawn_once_per_solve():
    model = build(dropout=0.3, attention_dropout=0.3)

    @jit
    def twice(key):
        f = model.equation(tokens(), model.fresh_memory(2), key).f
        return jax.lax.map(f, jnp.ones((2, 2, 8, 32)))

    first, again = twice(jax.random.key(0))
    np.testing.assert_array_equal(first, again)
    assert np.abs(twice(jax.random.key(1))[0] - first).max() > 1e-2


@pytest.mark.slow
def test_without_a_key_there_is_no_dropout_and_with_one_a_solve_still_converges():
    model = build(mem_len=0, dropout=0.2, attention_dropout=0.2)
    split, memory = nnx.split(model), model.fresh_memory(2)
    plain, without = (run(*s, tokens(), memory).hidden_BLD for s in (split, nnx.split(build(mem_len=0))))
    dropped = run(*split, tokens(), memory, key=jax.random.key(0))
    np.testing.assert_array_equal(plain, without)
    assert dropped.stats.converged.all()
    lost = (np.asarray(dropped.hidden_BLD) == 0).all(-1)
    assert 0 < lost.mean() < 1, "some tokens lose their whole output"
    assert np.abs(dropped.hidden_BLD - plain).max() > 1e-2


@pytest.mark.parametrize(("kind", "axis"), [("tokens", -1), ("features", 1)])
def test_output_dropout_drops_whole_tokens_or_features(kind, axis):
    model = build(dropout=0.5, output_dropout=kind)
    hidden = run(*nnx.split(model), tokens(), model.fresh_memory(2), SOLVER, Unroll(1), key=jax.random.key(0)).hidden_BLD
    zero = np.asarray(hidden) == 0
    assert (zero.all(axis) == zero.any(axis)).all()
    assert 0 < zero.mean() < 1


@pytest.mark.slow
def test_the_jacobian_loss_is_optional_and_so_is_a_limit_on_evaluations():
    model = build()
    split, memory = nnx.split(model), model.fresh_memory(2)
    unlimited = run(*split, tokens(), memory)
    assert unlimited.jacobian_loss is None and unlimited.stats.nfe > 3
    out = run(*split, tokens(), memory, max_steps=jnp.int32(3), jacobian_key=jax.random.key(0))
    assert out.jacobian_loss > 0
    assert out.stats.nfe == 3


def test_without_solve_the_library_solves_with_its_defaults():
    graphdef, state = nnx.split(build(mem_len=0))
    both = jit(lambda s: [nnx.merge(graphdef, s)(tokens(), memory, solve=solve) for solve in (None, fixed_point_alone)])
    memory = nnx.merge(graphdef, state).fresh_memory(2)
    default, expected = both(state)
    np.testing.assert_array_equal(default.hidden_BLD, expected.hidden_BLD)
    assert default.jacobian_loss is None and default.stats.converged.all()


def fixed_point_alone(f, z0):
    return fixed_point(f, z0), None


@pytest.mark.slow
def test_the_jacobian_loss_holds_the_equilibrium_constant_unless_asked_otherwise():
    graphdef, state = nnx.split(build(mem_len=0))
    key = jax.random.key(0)

    def by_model(state, through):
        model = nnx.merge(graphdef, state)
        solve = solving(gradient=Unroll(1), jacobian_key=key, jacobian_through_equilibrium=through)
        return model(tokens(), model.fresh_memory(2), solve=solve).jacobian_loss

    def by_hand(state):
        model = nnx.merge(graphdef, state)
        f, z0, _ = model.equation(tokens(), model.fresh_memory(2))
        return jacobian_loss(f, jax.lax.stop_gradient(f(z0)), key)

    grads = jit(lambda s: [jax.grad(by_model)(s, False), jax.grad(by_model)(s, True), jax.grad(by_hand)(s)])(state)
    constant, through, expected = (reference.flat(g)["cell/inner/v_IO"] for g in grads)
    close(constant, expected, 1e-6)
    assert np.abs(through - expected).max() > 1e-3 * np.abs(expected).max()


def test_memory_carries_no_gradient():
    graphdef, state = nnx.split(build(mem_len=4))

    def loss(state):
        model = nnx.merge(graphdef, state)
        memory = model(tokens(), model.fresh_memory(2), solve=solving(gradient=Unroll(1))).memory
        return memory.states_BMD.sum() + memory.injections_BMJ.sum()

    assert all(not g.any() for g in reference.flat(jit(jax.grad(loss))(state)).values())


def test_full_size_parameter_count():
    """The published WikiText-103 model."""
    sizes = dict(d_model=700, d_embed=700, n_head=10, d_head=70, d_inner=48_000)
    options = TransformerOptions(vocab_size=267_735, cutoffs=(20_000, 40_000, 200_000), div_value=4, **sizes)
    state = nnx.state(nnx.eval_shape(lambda: DEQTransformer(options, rngs=nnx.Rngs(0))), nnx.Param)
    count = sum(int(np.prod(param.shape)) for _, param in nnx.to_flat_state(state))
    tied_projections = 700 * (700 // 4 + 700 // 16 + 700 // 64)  # two parameters on one storage in the original: counted twice
    assert count == reference.facts()["wt103"]["n_params_unique"] - tied_projections


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output_dropout="all"), "known: features, none, tokens"),
        (dict(dtype="half"), "known: bfloat16, float32"),
        (dict(dropout=-0.1), "dropout must lie"),
        (dict(mem_len=-1), "not be negative"),
        (dict(local_size=-1), "not be negative"),
        (dict(d_model=31), "d_model must be even"),
        (dict(blocks=0), "blocks must be at least 1"),
        (dict(affine_norm=True), "set pre_norm too"),
        (dict(vocab_size=0), "vocab_size must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
