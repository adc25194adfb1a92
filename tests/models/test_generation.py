"""Laws of generation: one token at a time gives the same text as whole forward passes."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.equilibrium import Picard
from deq_flax.models import generation
from deq_flax.models.generation import Generator, Sampling
from tests import reference
from tests.reference import solving

TIGHT = Picard(tol=1e-6, max_steps=200)
PROMPT = np.array([5, 17, 300, 5, 999, 42, 17, 300, 5, 999])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", 4)


@cache
def model(**options):
    return reference.build("lm_deq_postln", wide=False, **options)


@cache
def generator(**options):
    return Generator(model(), **(dict(solver=TIGHT, sampling=Sampling(), memory=40) | options))


def test_greedy_text_is_the_argmax_of_a_full_forward_pass():
    written = [int(token) for (token,), _ in generator().tokens([PROMPT], 20)]
    text = np.concatenate([PROMPT, written])[None]

    @jax.jit
    def whole(tokens_BL):
        out = model()(tokens_BL, model().fresh_memory(1), solve=solving(solver=TIGHT))
        return model().log_probabilities(out.hidden_BLD)

    likeliest = np.argmax(whole(text)[0], axis=-1)
    assert written == likeliest[len(PROMPT) - 1 : -1].tolist()


@pytest.mark.slow
def test_a_warm_start_saves_evaluations_and_changes_no_token(monkeypatch):
    """For a model that attends to few tokens, as the tokens of real texts depend on few others."""
    text, found = np.tile(PROMPT[1:6], 6), []
    nowhere = lambda memory, injection_BLJ: jnp.zeros((*injection_BLJ.shape[:2], memory.states_BMD.shape[2]))  # noqa: E731
    for start in (generation.nearest_states, nowhere):
        monkeypatch.setattr(generation, "nearest_states", start)
        near = Generator(model(local_size=3), solver=TIGHT, sampling=Sampling(), memory=40)
        state, evaluations, likeliest = near.start([[]]), 0.0, []
        for token in text:
            state = near.step(state._replace(token_B=jnp.array([token], jnp.int32)))
            evaluations += float(state.nfe)
            likeliest.append(int(state.token_B[0]))
        found.append((likeliest, evaluations))
    (warm, spent), (cold, spent_cold) = found
    assert warm == cold
    assert spent < 0.8 * spent_cold, (spent, spent_cold)


def test_a_solve_begins_at_the_state_of_the_nearest_remembered_input():
    random = np.random.default_rng(0)
    states, injections = random.normal(size=(2, 1, 6, 4)).astype(np.float32)
    memory = generation.Memory(jnp.asarray(states), jnp.asarray(injections), jnp.array([4]))
    asked = injections[:, [5, 2, 0]] + 1e-3  # the first entries of the memory are not valid
    found = generation.nearest_states(memory, jnp.asarray(asked))
    valid = injections[0, 2:]
    nearest = 2 + np.argmin(np.square(asked[0, 2] - valid).sum(-1))
    np.testing.assert_array_equal(found[0], states[0, [5, 2, nearest]])
    empty = memory._replace(length_B=jnp.array([0]))
    assert not generation.nearest_states(empty, jnp.asarray(asked)).any()


def test_a_prompt_may_come_in_pieces():
    at_once = generator().start([PROMPT])
    state = generator().start([PROMPT[:7]])
    for token in PROMPT[7:]:
        state = generator().step(state._replace(token_B=jnp.array([token], jnp.int32)))
    assert at_once.position_B == state.position_B == len(PROMPT)
    assert at_once.memory.length_B == len(PROMPT)
    for a, b in zip(at_once.memory, state.memory, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    assert at_once.token_B == state.token_B


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_of_known_words_alone_or_with_others(monkeypatch):
    """Prompts of other lengths, a seed for each text, and solves that end at other evaluations do not mix."""
    monkeypatch.setattr(generation, "CHUNK", 1)
    drawing, prompts = generator(sampling=Sampling(temperature=5.0), words=7), [PROMPT[:3], PROMPT[:1], PROMPT[2:7]]
    texts = [[int(token) for (token,), _ in drawing.tokens([ids], 8, 1 + i)] for i, ids in enumerate(prompts)]
    assert len({*map(tuple, texts)}) == 3
    assert all(token < 7 for text in texts for token in text)
    together = np.stack([tokens for tokens, _ in drawing.tokens(prompts, 8, 1)], axis=1)
    assert together.tolist() == texts


def test_generation_leaves_the_model_as_it_was():
    before = reference.flat(nnx.state(model()))
    list(generator().tokens([PROMPT], 2))
    after = reference.flat(nnx.state(model()))
    assert set(before) == set(after) and model().options.mem_len == 16
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (dict(temperature=0.0), [3]),
        (dict(temperature=1.0, top_k=1), [3]),
        (dict(temperature=1.0, top_p=1e-6), [3]),
        (dict(temperature=1.0, top_k=2), [3, 0]),
        (dict(temperature=1.0, top_p=0.55), [3, 0]),
        (dict(temperature=1.0, top_k=9, top_p=0.95), [3, 0, 1]),
        (dict(temperature=0.2, top_p=0.5), [3]),
        (dict(temperature=1.0), [3, 0, 1, 2]),
    ],
)
def test_tokens_are_drawn_from_the_most_likely_in_proportion(options, allowed):
    p_V = np.array([0.3, 0.15, 0.05, 0.5])
    keys = jax.random.split(jax.random.key(0), 4000)
    sampling = Sampling(**options)
    drawn = np.asarray(jax.vmap(lambda key: sampling.choose(jnp.log(jnp.asarray(p_V)), key))(keys))
    weights = np.zeros(4)
    weights[allowed] = p_V[allowed] ** (1 / (sampling.temperature or 1))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, weights / weights.sum(), atol=0.03)
    assert set(drawn) == set(allowed)


@pytest.mark.parametrize(
    "options", [dict(temperature=-1.0), dict(temperature=np.nan), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1)]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="temperature and top_k"):
        Sampling(**options)
    with pytest.raises(ValueError, match="memory must be at least 1"):
        Generator(model(), solver=TIGHT, sampling=Sampling(), memory=0)
