"""Generation with a Transformer language model that has an equilibrium, one token at a time, of one text or several together.

Every token is a segment of its own: its state is the equilibrium given the earlier states, which stay in the memory and are not
solved for again.

B texts, L length, M memory, D model features, J features of an injection, V words, K most likely words.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from deq_flax.equilibrium import Solution, Solver, fixed_point
from deq_flax.models.deq_transformer import EquilibriumTransformer
from deq_flax.models.layers import LayerMemory
from deq_flax.nn.linear import Linear
from deq_flax.nn.transformer import Memory

CHUNK = 64
"""Tokens of the prompt that one solve reads."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The choice of the next word from the model's distribution.

    Raises:
      ValueError: a value is out of range.
    """

    temperature: float = 0.0
    """Divisor of the log-probabilities; 0: the most likely word is always taken."""
    top_k: int = 0
    """Words to draw from, the most likely ones; 0: all."""
    top_p: float = 1.0
    """Draw from the fewest most likely words of at least this probability together; 1: from all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature and top_k must be at least 0, and top_p above 0 and at most 1")

    def choose(self, log_p_V: jax.Array, key: jax.Array) -> jax.Array:
        """Choose a word: its id, a scalar int32."""
        if self.temperature == 0:
            return jnp.argmax(log_p_V).astype(jnp.int32)
        scaled_V = log_p_V / self.temperature
        if self.top_k == 0 and self.top_p == 1:
            return jax.random.categorical(key, scaled_V).astype(jnp.int32)
        ranked_K, words_K = lax.top_k(scaled_V, min(self.top_k or len(log_p_V), len(log_p_V)))
        p_K = jax.nn.softmax(ranked_K)
        before_K = jnp.cumsum(p_K) - p_K  # probability of the words that rank higher
        return words_K[jax.random.categorical(key, jnp.where(before_K < self.top_p, ranked_K, -jnp.inf))].astype(jnp.int32)


class State(NamedTuple):
    """The state of texts that are being generated."""

    memory: Memory | LayerMemory
    token_B: jax.Array
    """The next words, which the memory does not hold yet, int32."""
    position_B: jax.Array
    """Number of tokens before the next words, int32."""
    nfe: jax.Array
    """Evaluations of f in the last solve: for the last tokens, or the last chunk of the prompts."""


class Generator:
    """Generation of texts with a language model that has an equilibrium, and that is left unchanged.

    Each token's solve of a DEQ-Transformer starts at the state of the remembered token whose injection is nearest, not at zero.
    A `ProposalDEQ` starts at its proposal.

    Args:
      model: the model, on the default device.
      solver: solver of the equilibria.
      sampling: the choice of the next word.
      memory: number of tokens to remember, at least 1.
      words: choose among the first `words` of the model's words only; None: among all.

    Raises:
      ValueError: memory is less than 1.
    """

    def __init__(
        self,
        model: EquilibriumTransformer,
        *,
        solver: Solver,
        sampling: Sampling,
        memory: int,
        words: int | None = None,
    ):
        if memory < 1:
            raise ValueError(f"memory must be at least 1, not {memory}")
        model = nnx.merge(*nnx.split(model))
        _fold_weight_norm(model)
        model.options = replace(model.options, mem_len=memory)
        graphdef, self._params = nnx.split(model)
        self._fresh = model.fresh_memory
        extend = partial(_extend, graphdef, solver, sampling, words)
        self._extend, self._step = jax.jit(extend), jax.jit(partial(_step, extend))

    def start(self, prompts: Sequence[Sequence[int] | np.ndarray], seed: int = 0) -> State:
        """Read prompts of at least one token each, and choose the word that follows each of them."""
        prompts = [np.asarray(ids, np.int32).reshape(-1) for ids in prompts]
        nothing_B = jnp.zeros(len(prompts), jnp.int32)
        state = State(self._fresh(len(prompts)), nothing_B, nothing_B, jnp.zeros(()))
        for start in range(0, max(map(len, prompts)), CHUNK):
            chunks = [ids[start : start + CHUNK] for ids in prompts]
            tokens_BL = np.stack([np.pad(chunk, (0, CHUNK - len(chunk))) for chunk in chunks])
            state = self._extend(self._params, state, tokens_BL, np.array([*map(len, chunks)], np.int32), np.int32(seed))
        return state

    def step(self, state: State, seed: int = 0) -> State:
        """Move the next words into the memory and choose those that follow them."""
        return self._step(self._params, state, np.int32(seed))

    def tokens(
        self, prompts: Sequence[Sequence[int] | np.ndarray], count: int, seed: int = 0
    ) -> Iterator[tuple[np.ndarray, float]]:
        """Yield `count` times the tokens that follow, (B,), with the number of evaluations of f in the solve before them.

        Text i is the one that its prompt alone gives with the seed `seed` + i.
        """
        state = self.start(prompts, seed)
        for i in range(count):
            following = self.step(state, seed) if i + 1 < count else state
            yield np.asarray(state.token_B), float(state.nfe)  # meanwhile the device computes the next ones
            state = following


def _extend(
    graphdef: nnx.GraphDef[EquilibriumTransformer],
    solver: Solver,
    sampling: Sampling,
    words: int | None,
    params: nnx.State,
    state: State,
    tokens_BL: jax.Array,
    count_B: jax.Array,
    seed: jax.Array,
) -> State:
    """Read the first `count_B` of `tokens_BL`, and choose the words that follow; a text without new tokens stays as it is."""
    model = nnx.merge(graphdef, params)
    equation, solution = solve(model, solver, tokens_BL, state.memory)
    memory = model.next_memory(state.memory, equation, solution.value, count_B)
    last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
    log_p_BV = model.log_probabilities(jnp.take_along_axis(solution.value, last_B11, axis=1))[:, 0, :words]
    position_B = state.position_B + count_B
    seed_B = seed + jnp.arange(len(count_B), dtype=jnp.int32)
    key_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seed_B, position_B)
    token_B = jnp.where(count_B > 0, jax.vmap(sampling.choose)(log_p_BV, key_B), state.token_B)
    return State(memory, token_B, position_B, solution.stats.nfe)


def solve(model: EquilibriumTransformer, solver: Solver, tokens_BL: jax.Array, memory: Any) -> tuple[Any, Solution]:
    """The equation of a segment and its solution, from the remembered states of the nearest injections or from the proposal."""
    equation = model.equation(tokens_BL, memory)
    z0_BLD = nearest_states(memory, equation.injection_BLJ) if isinstance(memory, Memory) else equation.z0_BLD
    return equation, fixed_point(equation.f, z0_BLD, solver=solver)


def _step(extend: Callable[..., State], params: nnx.State, state: State, seed: jax.Array) -> State:
    """Read the next words: one program, as a small model costs less than the dispatch of an operation or two."""
    return extend(params, state, state.token_B[:, None], jnp.ones_like(state.token_B), seed)


def nearest_states(memory: Memory, injection_BLJ: jax.Array) -> jax.Array:
    """The state of the remembered token with the nearest injection, for each token, (B, L, D); 0 if none is remembered.

    Tokens of the same word have the same injection, so for a repeated word it is the state of its last occurrence.
    """
    squared_BM = jnp.square(memory.injections_BMJ).sum(-1)
    products_BLM = jnp.einsum("blj,bmj->blm", injection_BLJ, memory.injections_BMJ)
    n_memory = squared_BM.shape[1]
    valid_BM = jnp.arange(n_memory)[None] >= n_memory - memory.length_B[:, None]
    distance_BLM = jnp.where(valid_BM[:, None], squared_BM[:, None] - 2 * products_BLM, jnp.inf)
    latest_BL1 = n_memory - 1 - jnp.argmin(distance_BLM[..., ::-1], axis=-1, keepdims=True)
    states_BLD = jnp.take_along_axis(memory.states_BMD, latest_BL1, axis=1)
    return jnp.where(memory.length_B[:, None, None] > 0, states_BLD, 0)


def _fold_weight_norm(model: nnx.Module) -> None:
    """Replace weight-normalized kernels by plain ones, which are not computed again for every token."""
    for _, module in list(nnx.iter_graph(model)):
        if isinstance(module, Linear) and module.weight_norm:
            module.weight_IO = nnx.Param(module.kernel())
            module.weight_norm = False
            del module.v_IO, module.g_O
