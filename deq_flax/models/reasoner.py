"""The common part of models of puzzles: embedding, initial state, heads.

B batch, S the axes of a puzzle's cells (L, or H and W), D features, K output symbols.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deq_flax.equilibrium import fixed_point
from deq_flax.equilibrium.solution import Solve
from deq_flax.models.model import ModelOptions, PuzzleModel, PuzzleOutput
from deq_flax.nn.linear import Linear, normal_param
from deq_flax.nn.precision import compute_dtype


@dataclass(frozen=True, kw_only=True)
class ReasonerOptions(ModelOptions):
    """Options of a model of puzzles.

    Raises:
      ValueError: a value is out of range.
    """

    input_symbols: int = 0
    """Number of symbols of a puzzle; 0 in a config: as many as the data has."""
    output_symbols: int = 0
    """Number of symbols of a solution; 0 in a config: as many as the data has."""
    width: int
    """Features of a cell's state."""
    initial: Literal["normal", "zero"] = "normal"
    """State that work on a puzzle starts from: normal, drawn from N(0, 1), or zero."""
    halting: bool = False
    """Add a head that predicts whether the answer is right."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the layers' contractions: float32 or bfloat16. Parameters and the solver's state are float32 in both."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")
        compute_dtype(self.dtype)


class Equation(NamedTuple):
    """The equation z = f(z) of a batch of puzzles."""

    f: Callable[..., Any]
    """(z, embedded puzzle) -> z; without a puzzle, with this one."""
    z0: Any
    x_BSD: jax.Array


class Reasoner(PuzzleModel):
    """An embedding x of the puzzle, a state z of its cells with z = f(z, x), and a linear head; a base for models.

    x is injected into every application of f (recall, Bansal et al. 2022, arXiv:2202.05826), so that an equilibrium depends on
    the puzzle. A subclass has the cell: `evaluate`, and, if its state is not one array (B, S, D), `draw` and `read`. It calls
    `__init__` with the options, then makes its cell.
    """

    has_equilibrium = True

    def __init__(self, options: Any, *, rngs: nnx.Rngs):
        if options.input_symbols < 1 or options.output_symbols < 1:
            raise ValueError("input_symbols and output_symbols must be at least 1: they are left to the data in a config only")
        self.options: Any = options
        self.dtype = compute_dtype(options.dtype)
        self.embedding_ND = normal_param(rngs.params(), (options.input_symbols, options.width), 1.0)
        self.head = Linear(options.width, options.output_symbols, init_std=options.width**-0.5, rngs=rngs)
        self.halt = Linear(options.width, 1, init_std=0.0, rngs=rngs) if options.halting else None
        if self.halt is not None and self.halt.bias_O is not None:
            self.halt.bias_O[...] = jnp.full((1,), -5.0)  # nothing is right at first (Graves 2016; HRM)

    def evaluate(self, z: Any, x_BSD: jax.Array) -> Any:
        """f(z) for an embedded puzzle."""
        raise NotImplementedError

    def read(self, z: Any) -> jax.Array:
        """The features (B, S, D) that the heads see."""
        return z

    def draw(self, shape: tuple[int, ...], key: jax.Array) -> Any:
        """A random state of cells of `shape`, (B, S, D)."""
        return jax.random.normal(key, shape, self.embedding_ND.dtype)

    def embed(self, inputs_BS: jax.Array) -> jax.Array:
        """(B, S) -> (B, S, D)."""
        return self.embedding_ND[...][inputs_BS]

    def initial_state(self, inputs: jax.Array, key: jax.Array | None = None) -> Any:
        state = self.draw((*inputs.shape, self.options.width), jax.random.key(0) if key is None else key)
        return state if self.options.initial == "normal" else jax.tree.map(jnp.zeros_like, state)

    def equation(self, inputs: jax.Array, state: Any = None, key: jax.Array | None = None) -> Equation:
        """The equation of a batch of puzzles, from `state` or, where that is None, from the initial state."""
        x_BSD = self.embed(inputs)

        def f(z: Any, x_BSD: jax.Array = x_BSD) -> Any:
            return self.evaluate(z, x_BSD)

        return Equation(f, self.initial_state(inputs, key) if state is None else state, x_BSD)

    def __call__(
        self, inputs: jax.Array, state: Any = None, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> PuzzleOutput:
        f, z0, x_BSD = self.equation(inputs, state, key)
        solution, jacobian_loss = (fixed_point(f, z0), None) if solve is None else solve(f, z0, x_BSD)
        logits, halt_B = self.answer(solution.value)
        return PuzzleOutput(logits, jax.lax.stop_gradient(solution.value), halt_B, solution.stats, jacobian_loss)

    def answer(self, z: Any) -> tuple[jax.Array, jax.Array | None]:
        """Logits (B, S, K) of a state, and those of halting (B,), read from the mean over cells; None without such a head."""
        features_BSD = self.read(z)
        if self.halt is None:
            return self.head(features_BSD, self.dtype), None
        mean_BD = features_BSD.mean(axis=tuple(range(1, features_BSD.ndim - 1)))
        return self.head(features_BSD, self.dtype), self.halt(mean_BD, self.dtype)[:, 0]
