"""The DEQ-Transformer agrees with the authors' PyTorch code, in float64, on every fixture of `tests/reference.py`.

Errors allowed: 1e-10 for one evaluation and the likelihoods, 1e-8 for equilibria, 1e-6 relative for gradients.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deq_flax.equilibrium import Broyden, Unroll, jacobian_loss, spectral_radius
from deq_flax.nn.attention import position_encoding
from deq_flax.nn.transformer import Masks, Memory
from tests import reference
from tests.cases import others_slow
from tests.reference import solving

AUTHORS = others_slow(["lm_deq_postln", "lm_deq_preln", "lm_deq_local", "lm_deq_div1", "lm_deq_nocut"], ["lm_deq_postln"])
FIXTURES = [*AUTHORS, "lm_tdeq_postln"]
TIGHT = Broyden(tol=1e-12, max_steps=120)
jit = partial(jax.jit, compiler_options=reference.QUICK_COMPILE)


@partial(jit, static_argnums=(0, 1, 2))
def run_segment(graphdef, solver, gradient, state, tokens_BL, targets_BL, memory):
    """(mean nll, (hidden, memory, nll)), and the gradient of the mean."""

    def loss(state):
        model = nnx.merge(graphdef, state)
        out = model(tokens_BL, memory, solve=solving(solver=solver, gradient=gradient))
        nll_BL = model.nll(out.hidden_BLD, targets_BL)
        return nll_BL.mean(), (out.hidden_BLD, out.memory, nll_BL)

    return jax.value_and_grad(loss, has_aux=True)(state)


@partial(jit, static_argnums=0)
def run_parts(graphdef, state, tokens_BL, targets_BL, memory, z_rand_BLD, z_star_BLD):
    model = nnx.merge(graphdef, state)
    equation = model.equation(tokens_BL, memory)
    f_rand_BLD, f_star_BLD = jax.lax.map(equation.f, jnp.stack([z_rand_BLD, z_star_BLD]))
    return model.embed(tokens_BL), equation.injection_BLJ, f_rand_BLD, f_star_BLD, model.nll(z_star_BLD, targets_BL)


def segment(arrays, s):
    return reference.by_batch(arrays[f"seg{s}/data"]), reference.by_batch(arrays[f"seg{s}/target"])


@cache
def results(name):
    """Our numbers for every segment of a fixture, each from our own memory of the segment before."""
    arrays, found = reference.load(name), []
    with jax.enable_x64(True):
        model = reference.build(name)
        graphdef, state = nnx.split(model)
        memory = model.fresh_memory(2)
        s = 0
        while f"seg{s}/data" in arrays:
            tokens_BL, targets_BL = segment(arrays, s)
            z = [reference.by_features_last(arrays[f"seg{s}/{key}"]) for key in ("z_rand", "z_star")]
            parts = run_parts(graphdef, state, tokens_BL, targets_BL, memory, *z)
            (loss, (hidden, memory, nll)), gradient = run_segment(graphdef, TIGHT, None, state, tokens_BL, targets_BL, memory)
            found.append(dict(parts=parts, hidden=hidden, memory=memory, nll=nll, loss=loss, gradient=reference.flat(gradient)))
            s += 1
    return arrays, found


def close(ours, theirs, error):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)


def same_gradients(ours, theirs, error=1e-6):
    """Every parameter's gradient, each relative to its own norm."""
    assert set(ours) == set(theirs)
    for path, expected in theirs.items():
        assert np.linalg.norm(ours[path] - expected) <= error * np.linalg.norm(expected), path


@pytest.mark.parametrize("name", FIXTURES)
def test_parts(name):
    arrays, found = results(name)
    for s, ours in enumerate(found):
        embedded, injection, f_rand, f_star, nll = ours["parts"]
        close(embedded, arrays[f"seg{s}/word_emb"], 1e-10)
        close(injection, np.swapaxes(arrays[f"seg{s}/u1s"], 1, 2), 1e-10)
        close(f_rand, np.swapaxes(arrays[f"seg{s}/f_z_rand"], 1, 2), 1e-10)
        close(f_star, np.swapaxes(arrays[f"seg{s}/z_star"], 1, 2), 1e-10)
        close(nll, arrays[f"seg{s}/nll"].T, 1e-10)


@pytest.mark.parametrize("name", FIXTURES)
def test_equilibrium_likelihoods_and_memory(name):
    arrays, found = results(name)
    for s, ours in enumerate(found):
        close(ours["hidden"], np.swapaxes(arrays[f"seg{s}/z_star"], 1, 2), 1e-8)
        close(ours["nll"], arrays[f"seg{s}/nll"].T, 1e-8)
        close(ours["loss"], arrays[f"seg{s}/loss"], 1e-8)
        states, injections = arrays[f"seg{s}/new_mem_z"], arrays[f"seg{s}/new_mem_u"]
        assert (np.asarray(ours["memory"].length_B) == len(states)).all()
        close(ours["memory"].states_BMD[:, -len(states) :], np.swapaxes(states, 0, 1), 1e-8)
        close(ours["memory"].injections_BMJ[:, -len(states) :], np.swapaxes(injections, 0, 1), 1e-8)


@pytest.mark.parametrize("name", FIXTURES)
def test_implicit_gradients(name):
    arrays, found = results(name)
    segments = [s for s in range(len(found)) if any(key.startswith(f"seg{s}/grad/") for key in arrays)]
    assert segments, "gradients are stored for some segments only"
    for s in segments:
        same_gradients(found[s]["gradient"], reference.our_gradients(arrays, f"seg{s}/grad/"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm_deq_postln", "lm_tdeq_postln"])
def test_jacobian_loss(name):
    arrays, found = results(name)
    with jax.enable_x64(True):
        graphdef, state = nnx.split(reference.build(name))
        v = reference.by_features_last(arrays["seg1/jac_v"])
        value, total, direct = run_jacobian(graphdef, state, segment(arrays, 1)[0], found[0]["memory"], v)
    close(value, arrays["seg1/jac_loss"], 1e-8)
    for gradient, kind in [(direct, "gjac_direct"), (total, "gjac_total")]:
        ours, theirs = reference.flat(gradient), reference.our_gradients(arrays, f"seg1/{kind}/")
        same_gradients({path: ours[path] for path in theirs}, theirs)
        assert all(path in theirs or not g.any() for path, g in ours.items())


@partial(jit, static_argnums=0)
def run_jacobian(graphdef, state, tokens_BL, memory, v):
    """The loss, its gradient through the equilibrium too, and its gradient with the equilibrium held constant."""

    def equilibrium(state):
        return nnx.merge(graphdef, state)(tokens_BL, memory, solve=solving(solver=TIGHT)).hidden_BLD

    def loss(state, z):
        return jacobian_loss(nnx.merge(graphdef, state).equation(tokens_BL, memory).f, z, vectors=v)

    z, pull = jax.vjp(equilibrium, state)
    value, (direct, z_bar) = jax.value_and_grad(loss, argnums=(0, 1))(state, z)
    return value, jax.tree.map(jnp.add, direct, pull(z_bar)[0]), direct


@pytest.mark.slow
def test_spectral_radius():
    arrays, found = results("lm_deq_postln")
    with jax.enable_x64(True):
        model = reference.build("lm_deq_postln")
        f = model.equation(segment(arrays, 1)[0], found[0]["memory"]).f
        rho_B = jit(lambda z: spectral_radius(f, z, jax.random.key(0), steps=300))(found[1]["hidden"])
    np.testing.assert_allclose(rho_B, arrays["seg1/rho"], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("prefix", "steps"), [("train_n2", 2), ("eval_n4", 4)])
def test_unrolled_pretraining(prefix, steps):
    arrays = reference.load("lm_deq_unroll2")
    with jax.enable_x64(True):
        model = reference.build("lm_deq_postln")
        graphdef, state = nnx.split(model)
        memory = model.fresh_memory(2)
        for s in range(2):
            inputs = segment(arrays, s)
            (loss, (hidden, memory, _)), gradient = run_segment(graphdef, TIGHT, Unroll(steps), state, *inputs, memory)
            close(loss, arrays[f"{prefix}/seg{s}/loss"], 1e-10)
            close(hidden, np.swapaxes(arrays[f"{prefix}/seg{s}/z_out"], 1, 2), 1e-10)
            if prefix == "train_n2":
                same_gradients(reference.flat(gradient), reference.our_gradients(arrays, f"{prefix}/seg{s}/grad/"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["postln", "preln"])
def test_dropout_masks(variant):
    arrays = {key.removeprefix(variant + "/"): value for key, value in reference.load("lm_deq_dropmask").items()}
    with jax.enable_x64(True):
        cell = reference.build(f"lm_deq_{variant}").cell
        z, states, old, both = (reference.by_features_last(arrays[key]) for key in ("z", "mem_z", "mem_u", "us"))
        masks = Masks(
            positions_1D=jnp.asarray(arrays["mask_pos"][:, :, 0]),
            probabilities_HBLK=jnp.asarray(arrays["mask_dropatt"].swapaxes(0, 1)),
            attended_B1D=reference.by_features_last(arrays["mask_attn_out"]),
            inner_B1F=jnp.asarray(arrays["mask_ff1"]),
            output_B1D=jnp.asarray(arrays["mask_ff2"]),
        )
        memory = Memory(states, old, jnp.full((2,), states.shape[1], jnp.int32))
        out = cell(z, both[:, states.shape[1] :], memory, position_encoding(32, 32, jnp.float64), masks)
    close(out, np.swapaxes(arrays["f"], 1, 2), 1e-10)


def test_position_encoding():
    arrays, _ = results("lm_deq_postln")
    with jax.enable_x64(True):
        close(position_encoding(32, 32, jnp.float64), arrays["seg1/pos_emb"][0].T, 1e-10)


@pytest.mark.slow
def test_training_with_adam():
    arrays = reference.load("train_deq_postln")
    with jax.enable_x64(True):
        model = reference.build("lm_deq_postln")
        graphdef, state = nnx.split(model)
        optimizer = optax.chain(optax.clip_by_global_norm(0.25), optax.adam(1e-3))
        memory, moments = model.fresh_memory(4), optimizer.init(state)
        update = jit(lambda g, m, s: (lambda u, m: (optax.apply_updates(s, u), m))(*optimizer.update(g, m, s)))
        losses, norms = [], []
        for tokens, targets in zip(arrays["data"], arrays["target"], strict=True):
            inputs = reference.by_batch(tokens), reference.by_batch(targets), memory
            (loss, (_, memory, _)), gradient = run_segment(graphdef, TIGHT, None, state, *inputs)
            losses.append(loss)
            norms.append(np.sqrt(sum(np.sum(g**2) for g in reference.flat(gradient).values())))
            state, moments = update(gradient, moments, state)
    close(losses, arrays["loss"], 1e-6)
    close(norms, arrays["grad_norm"], 1e-5)


@pytest.mark.parametrize("name", AUTHORS)
def test_float32(name):
    arrays = reference.load(name)
    model = reference.build(name, wide=False)
    graphdef, state = nnx.split(model)
    memory = model.fresh_memory(2)
    for s in range(2):
        tokens_BL, targets_BL = segment(arrays, s)
        hidden, memory, nll = run_forward(graphdef, Broyden(tol=1e-6, max_steps=60), state, tokens_BL, targets_BL, memory)
        assert hidden.dtype == jnp.float32
        close(hidden, np.swapaxes(arrays[f"seg{s}/z_star"], 1, 2), 1e-4)
        close(nll, arrays[f"seg{s}/nll"].T, 1e-4)


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
    arrays = reference.load("lm_deq_postln")
    model = reference.build("lm_deq_postln", wide=False, dtype="bfloat16")
    graphdef, state = nnx.split(model)
    tokens_BL, targets_BL = segment(arrays, 0)
    memory, solver = model.fresh_memory(2), Broyden(tol=3e-3, max_steps=40)
    hidden, _, nll = run_forward(graphdef, solver, state, tokens_BL, targets_BL, memory)
    assert hidden.dtype == nll.dtype == jnp.float32
    z_star = np.swapaxes(arrays["seg0/z_star"], 1, 2)
    assert np.linalg.norm(hidden - z_star) < 2e-2 * np.linalg.norm(z_star)
    np.testing.assert_allclose(nll.mean(), arrays["seg0/loss"], rtol=2e-2)
    _, gradient = run_segment(graphdef, solver, None, state, tokens_BL, targets_BL, memory)
    for path, expected in reference.our_gradients(arrays, "seg0/grad/").items():
        ours = reference.flat(gradient)[path]
        assert np.linalg.norm(ours - expected) < 0.1 * np.linalg.norm(expected), path


@partial(jit, static_argnums=(0, 1))
def run_forward(graphdef, solver, state, tokens_BL, targets_BL, memory):
    model = nnx.merge(graphdef, state)
    out = model(tokens_BL, memory, solve=solving(solver=solver))
    return out.hidden_BLD, out.memory, model.nll(out.hidden_BLD, targets_BL)
