"""Reasoning: solve puzzles by iterating to an answer, larger ones than those trained on by iterating longer.

With several segments a puzzle stays in its slot of the batch for as many steps: each begins at the state where the last one
ended and is an update of its own ("deep supervision"; Wang et al. 2025, HRM, arXiv:2506.21734). State, number of segments and
puzzle of every slot are the carry.

B batch, S the axes of a puzzle's cells, K output symbols.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deq_flax.data.loading import EvalBatches, iterate, train_dataset
from deq_flax.data.puzzles.puzzles import PuzzleOptions, check_learned, load_puzzles
from deq_flax.equilibrium import Unroll, fixed_point
from deq_flax.equilibrium.loop import select_samples
from deq_flax.equilibrium.restarts import best_start
from deq_flax.equilibrium.solution import Solve, SolverStats
from deq_flax.errors import UserError
from deq_flax.models import abstract_model, build_model
from deq_flax.models.model import PuzzleOutput
from deq_flax.task import Batch, Batches, LossOutput, Metrics, average
from deq_flax.tasks.puzzle_pictures import DRAWINGS, in_a_row


@dataclass(frozen=True, kw_only=True)
class ReasoningLoss:
    """Section `loss` of a reasoning config."""

    cross_entropy: Literal["softmax", "stablemax"] = "softmax"
    """Probabilities of the symbols: softmax, or stablemax, whose logarithms of large scores stay finite in narrow types."""
    segments: int = 1
    """Most steps that a puzzle is worked on, each from the state where the one before ended."""
    eval_segments: int = 0
    """Segments of evaluation; 0: segments."""
    halt_weight: float = 0.0
    """Weight of the halting head's loss, the cross entropy of whether the answer is right; 0: no halting."""
    halt_exploration: float = 0.1
    """Probability that a puzzle is kept for a random number of segments in training, though it may seem solved."""

    @property
    def segments_of_evaluation(self) -> int:
        """Segments that evaluation works on every puzzle."""
        return self.eval_segments or self.segments

    def __post_init__(self):
        if self.segments < 1 or self.eval_segments < 0:
            raise UserError(f"loss.segments must be at least 1, not {self.segments}, and eval_segments at least 0")
        if not self.halt_weight >= 0 or not 0 <= self.halt_exploration <= 1:
            raise UserError("loss.halt_weight must not be negative, and halt_exploration is a probability")


class Slots(NamedTuple):
    """The memory of a batch's slots: the carry of training with several segments."""

    state: Any
    """The model's state, (B, ...)."""
    puzzle: dict[str, jax.Array]
    """The batch's arrays, (B, ...)."""
    segments_B: jax.Array
    """int32: segments that the puzzle was worked on."""
    free_B: jax.Array
    """bool: true where the puzzle is done with, so that the slot takes the next one."""


class ReasoningTask:
    """A puzzle model on puzzles.

    Args:
      data, model, loss: these sections of the config; `model.input_symbols` and `output_symbols` 0 take the data's.
      seed: decides order and augmentation.

    Raises:
      UserError: the puzzles cannot be generated or read, or an option does not suit them.
    """

    Data, Loss, kind = PuzzleOptions, ReasoningLoss, "puzzle"

    def __init__(self, data: PuzzleOptions, model: Any, *, loss: ReasoningLoss, seed: int = 0):
        self._data, self._loss, self._seed, self._restarts = data, loss, seed, 1
        self.batch_size, self.eval_batch_size = data.batch_size, data.eval_batch_size
        self.puzzles = load_puzzles(data)
        self.model_options = _with_symbols(model, self.puzzles.input_symbols, self.puzzles.output_symbols)
        if loss.halt_weight and not getattr(model, "halting", False):
            raise UserError("loss.halt_weight needs a model with a halting head: set model.halting to True")
        self._puzzle_shape = self.puzzles.train.inputs.shape[1:]
        train_dataset(self.puzzles.train, self.batch_size, seed=seed)  # too few examples are refused now
        self._check_fit()

    def _check_fit(self) -> None:
        """Raise UserError unless the model takes the puzzles of every size; nothing is computed."""
        graphdef, state = nnx.split(abstract_model(self.model_options))
        solve: Solve = lambda f, z0, *inputs: (fixed_point(f, z0, *inputs, gradient=Unroll(1)), None)  # noqa: E731
        for size, examples in ((self._data.size, self.puzzles.train), *self.puzzles.larger.items()):
            inputs = jax.ShapeDtypeStruct((1, *examples.inputs.shape[1:]), jnp.int32)
            try:
                jax.eval_shape(lambda state, inputs: nnx.merge(graphdef, state)(inputs, solve=solve).logits, state, inputs)
            except ValueError as error:
                raise UserError(f"section model: it takes no puzzles of size {size}: {error}") from error

    def with_restarts(self, count: int) -> "ReasoningTask":
        """This task, evaluated from `count` random starts for each puzzle. UserError: the model's start is not random."""
        if getattr(self.model_options, "initial", "zero") != "normal":
            raise UserError("eval.restarts needs random starts: set model.initial to normal")
        other = copy.copy(self)
        other._restarts = count
        return other

    def check_weights(self, config: Any) -> None:
        try:
            learned = str(config["data"]["name"])
        except (KeyError, TypeError) as error:
            raise UserError("this checkpoint does not say what puzzle its model has learned") from error
        check_learned(self._data.name, learned)

    def build_model(self, rngs: Any) -> Any:
        return build_model(self.model_options, rngs=rngs)

    def train_batches(self, step: int, rows: slice | None = None) -> Iterator[Batch]:
        return iterate(train_dataset(self.puzzles.train, self.batch_size, seed=self._seed, rows=rows), step)

    def eval_batches(self, split: str, rows: slice | None = None) -> Batches:
        """The batches of one size after the other; 'test' has those of the larger sizes too."""
        examples = [self.puzzles.split(split), *(self.puzzles.larger.values() if split == "test" else ())]
        return _OneAfterAnother([EvalBatches(each, self.eval_batch_size, rows) for each in examples])

    def fresh_carry(self, model: Any, batch_size: int) -> Slots | tuple[()]:
        if self._loss.segments == 1:
            return ()
        inputs = jnp.zeros((batch_size, *self._puzzle_shape), jnp.int32)
        puzzle = {"inputs": inputs, "targets": jnp.zeros_like(inputs), "mask": jnp.zeros(batch_size)}
        state = jax.tree.map(jnp.zeros_like, jax.eval_shape(model.initial_state, inputs))
        return Slots(state, puzzle, jnp.zeros(batch_size, jnp.int32), jnp.ones(batch_size, bool))

    def equation(self, model: Any, batch: Batch, carry: Any) -> tuple[Callable[[Any], Any], Any]:
        f, z0, *_ = model.equation(batch["inputs"])
        return f, z0

    def loss(
        self, model: Any, batch: Batch, carry: Any, *, solve: Solve | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, LossOutput]:
        """The mean over puzzles of the mean cross entropy of their cells, and the halting head's."""
        if key is None:
            if self._restarts > 1:
                output, extra = self._from_many_starts(model, batch, solve)
            else:
                output, extra = self._worked_out(model, batch["inputs"], None, solve), {}
            return self._evaluated(batch, output, carry, extra | _of_solver(output.stats))
        if self._loss.segments == 1:
            return self._scored(batch, model(batch["inputs"], solve=solve, key=key), carry)
        start_key, solve_key, halt_key = jax.random.split(key, 3)
        slots = _refilled(carry, batch, model.initial_state(batch["inputs"], start_key))
        output = model(slots.puzzle["inputs"], slots.state, solve=solve, key=solve_key)
        segments_B = slots.segments_B + 1
        free_B = self._done(output.halt_B, segments_B, halt_key)
        value, scored = self._scored(slots.puzzle, output, Slots(output.state, slots.puzzle, segments_B, free_B))
        scored.metrics["segments"] = average(jnp.sum(segments_B * free_B), jnp.sum(free_B))
        return value, scored

    def _worked_out(self, model: Any, inputs: jax.Array, key: jax.Array | None, solve: Solve | None) -> PuzzleOutput:
        """The output after all segments of evaluation; its evaluations and steps are sums over the segments.

        `key` draws the start; None: the fixed one.
        """
        state, count = model.initial_state(inputs, key), self._loss.segments_of_evaluation
        if count == 1:
            return model(inputs, state, solve=solve)

        # Only the state and the counts pass from one segment to the next.
        def segment(carried: tuple[Any, jax.Array, jax.Array], _: None) -> tuple[Any, None]:
            state, nfe, steps_B = carried
            output = model(inputs, state, solve=solve)
            return (output.state, nfe + output.stats.nfe, steps_B + output.stats.steps), None

        carried = (state, jnp.zeros(()), jnp.zeros(inputs.shape[0]))
        (state, nfe, steps_B), _ = jax.lax.scan(segment, carried, None, length=count - 1)
        last = model(inputs, state, solve=solve)
        stats = dataclasses.replace(last.stats, nfe=last.stats.nfe + nfe, steps=last.stats.steps + steps_B)
        return last._replace(stats=stats)

    def _from_many_starts(self, model: Any, batch: Batch, solve: Solve | None) -> tuple[PuzzleOutput, dict[str, jax.Array]]:
        """The output of lowest residual over the starts, for each puzzle, and metrics (B,) of how the starts agree.

        `exact_match_vote`: true where the most frequent answer is right; among equally frequent ones the lower residual counts.
        `agreement`: true where all starts give the same answer, the measure of path independence (Anil et al. 2022).
        """
        keys = jax.random.split(jax.random.key(1), self._restarts)
        outputs = jax.lax.map(lambda key: self._worked_out(model, batch["inputs"], key, solve), keys)
        residual_KB = outputs.stats.relative_residual
        rows = jnp.arange(residual_KB.shape[1])

        def chosen(leaf: jax.Array, start_B: jax.Array) -> jax.Array:
            return leaf[start_B, rows] if leaf.ndim > 1 else leaf.sum()  # the number of evaluations has no batch axis: a sum

        best_B = best_start(residual_KB)
        answers_KBC = jnp.argmax(outputs.logits, axis=-1).reshape(*residual_KB.shape, -1)
        alike_KKB = (answers_KBC[:, None] == answers_KBC[None]).all(axis=-1)
        votes_KB = alike_KKB.sum(axis=1)
        winners_KB = votes_KB == votes_KB.max(axis=0, keepdims=True)
        voted_B = best_start(jnp.where(winners_KB, residual_KB, jnp.inf))
        voted_BC, targets_BC = answers_KBC[voted_B, rows], batch["targets"].reshape(len(rows), -1)
        extra = {"exact_match_vote": (voted_BC == targets_BC).all(axis=-1), "agreement": alike_KKB[0].all(axis=0)}
        return jax.tree.map(lambda leaf: chosen(leaf, best_B), outputs), extra

    def _done(self, halt_B: jax.Array | None, segments_B: jax.Array, key: jax.Array) -> jax.Array:
        """Choose the puzzles that leave their slots: after the last segment, or where the head takes the answer for right.

        Sometimes a puzzle stays for a random number of segments at least (Wang et al. 2025, section 2, adaptive computation).
        """
        done_B = segments_B >= self._loss.segments
        if halt_B is None or not self._loss.halt_weight:
            return done_B
        explore_key, least_key = jax.random.split(key)
        explores_B = jax.random.bernoulli(explore_key, self._loss.halt_exploration, done_B.shape)
        least_B = jnp.where(explores_B, jax.random.randint(least_key, done_B.shape, 2, self._loss.segments + 1), 0)
        return done_B | ((halt_B > 0) & (segments_B >= least_B))

    def _evaluated(
        self, batch: Batch, output: PuzzleOutput, carry: Any, extra: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, LossOutput]:
        """Loss, metrics and carry of an output of evaluation.

        Names of metrics end in the puzzles' size, unless it is the size trained on. Statistics are those of that size only:
        what the step makes of them has no size in its name.
        """
        value, scored = self._scored(batch, output, carry, extra)
        if self._loss.segments_of_evaluation > 1:
            scored.metrics["segments"] = average(float(self._loss.segments_of_evaluation))
        size = batch["targets"].shape[1]
        if size == self._data.size:
            return value, scored
        counted = {} if output.stats is None else {"forward_nfe": average(output.stats.nfe)}
        metrics = {f"{name}_{size}": metric for name, metric in (scored.metrics | counted).items()}
        return value, scored._replace(metrics=metrics, stats=None)

    def _scored(
        self, batch: Batch, output: PuzzleOutput, carry: Any, extra: Mapping[str, jax.Array] = MappingProxyType({})
    ) -> tuple[jax.Array, LossOutput]:
        """Loss, metrics and carry of an output. `extra`: more metrics, a number for each puzzle."""
        targets_BS, mask_B = batch["targets"], batch["mask"]
        logits_BSK = output.logits.astype(jnp.float32)
        cells = tuple(range(1, targets_BS.ndim))
        loss_B = self._cross_entropy(logits_BSK, targets_BS).mean(axis=cells)
        right_BS = jnp.argmax(logits_BSK, axis=-1) == targets_BS
        exact_B = right_BS.all(axis=cells).astype(jnp.float32)
        count = jnp.sum(mask_B)
        of = lambda values_B: average(jnp.sum(values_B * mask_B), count)  # noqa: E731
        metrics: Metrics = {
            "loss": of(loss_B),
            "exact_match": of(exact_B),
            "cell_accuracy": of(right_BS.mean(axis=cells, dtype=jnp.float32)),
        }
        if output.halt_B is not None and self._loss.halt_weight:
            halt_loss_B = optax.sigmoid_binary_cross_entropy(output.halt_B, exact_B)
            halts_B = (output.halt_B > 0).astype(jnp.float32)
            metrics |= {"halt_loss": of(halt_loss_B), "halted": of(halts_B), "halt_accuracy": of(halts_B == exact_B)}
            loss_B = loss_B + self._loss.halt_weight * halt_loss_B
        metrics |= {name: of(values_B) for name, values_B in extra.items()}
        value = jnp.sum(loss_B * mask_B) / jnp.maximum(count, 1.0)
        return value, LossOutput(carry, metrics, output.stats, output.jacobian_loss)

    def _cross_entropy(self, logits_BSK: jax.Array, targets_BS: jax.Array) -> jax.Array:
        if self._loss.cross_entropy == "stablemax":
            logits_BSK = jnp.where(logits_BSK < 0, -jnp.log1p(jnp.abs(logits_BSK)), jnp.log1p(jnp.abs(logits_BSK)))
        return optax.softmax_cross_entropy_with_integer_labels(logits_BSK, targets_BS)

    def picture_batch(self) -> Batch | None:
        if self._data.name not in DRAWINGS or not self._data.pictures:
            return None
        valid = self.puzzles.valid
        return valid.read(np.arange(min(self._data.pictures, len(valid))), None)

    def picture_arrays(self, model: Any, batch: Batch, *, solve: Solve | None) -> jax.Array:
        """The answers (B, S)."""
        return jnp.argmax(self._worked_out(model, batch["inputs"], None, solve).logits, axis=-1)

    def pictures(self, batch: Batch, arrays: Any) -> dict[str, np.ndarray]:
        """The answers in a row, wrong cells in red."""
        draw, puzzles = DRAWINGS[self._data.name], (batch["inputs"], np.asarray(arrays), batch["targets"])
        return {"answers": in_a_row([draw(*each) for each in zip(*puzzles, strict=True)])}

    def summary(self, split: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of the size trained on, then of the others by size."""
        return {name: metrics[name] for name in sorted(metrics, key=_place)}

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        return {"examples_per_second": self.batch_size / seconds_per_step}


class _OneAfterAnother:
    """The batches of several data sets in sequence, by index."""

    def __init__(self, parts: Sequence[Batches]):
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> Batch:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(f"batch {index + len(self)} of {len(self)}")


_ORDER = (
    *("loss", "exact_match", "exact_match_vote", "agreement", "cell_accuracy", "steps", "residual", "converged"),
    *("halted", "halt_accuracy", "halt_loss", "segments", "forward_nfe"),
)


def _place(name: str) -> tuple[int, int]:
    """The place of a metric in the log: by size, 0 for that trained on, then in the order above."""
    base, _, size = name.rpartition("_")
    return (int(size), _ORDER.index(base)) if size.isdigit() else (0, _ORDER.index(name))


def _of_solver(stats: SolverStats | None) -> dict[str, jax.Array]:
    """Metrics of each puzzle: the steps taken, the relative residual of the state that was read, and 1 if it has converged."""
    if stats is None:
        return {}
    return {"steps": stats.steps, "residual": stats.relative_residual, "converged": stats.converged}


def _refilled(slots: Slots, batch: Batch, state: Any) -> Slots:
    """The slots with the batch's puzzles in those that are free, to be started from `state`."""
    puzzle = {name: batch[name] for name in slots.puzzle}
    fresh = Slots(state, puzzle, jnp.zeros_like(slots.segments_B), slots.free_B)
    return select_samples(slots.free_B, fresh, slots)


def _with_symbols(model: Any, inputs: int, outputs: int) -> Any:
    """The model's options with the numbers of symbols that were left to the data. UserError: it has too few."""
    for name, found in (("input_symbols", inputs), ("output_symbols", outputs)):
        if getattr(model, name) == 0:
            model = dataclasses.replace(model, **{name: found})
        elif getattr(model, name) < found:
            raise UserError(f"model.{name} is {getattr(model, name)}, but the puzzles have {found}: set it to that, or to 0")
    return model
