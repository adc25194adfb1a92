"""The reasoning task: every puzzle counts once at its size, slots keep their puzzles through segments, runs resume exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.config import make_task as task_of
from deq_flax.config import phases_of, resolve, to_dict
from deq_flax.equilibrium import SolverStats
from deq_flax.errors import UserError
from deq_flax.models.model import PuzzleOutput
from deq_flax.tasks.reasoning import Slots
from deq_flax.train.evaluate import evaluate, evaluate_checkpoint
from tests.train.commands import metrics
from tests.train.small import arrays, evaluation_of, make_task, run, solve_of


def config(**overrides):
    """A config of a run of seconds; overrides by section name."""
    sections = {
        "task": "reasoning",
        "data": dict(
            name="prefix_sums", size=6, test_sizes=(9,), train_examples=20, valid_examples=3, test_examples=5, batch_size=4,
            eval_batch_size=4,
        ),
        "model": dict(name="conv_reasoner", width=4, blocks=0),
        "deq": dict(
            solver="picard", tol=1e-3, max_steps=6, max_steps_jitter=3, gradient="unroll", eval_max_steps=9,
            gradient_options={"last": 2, "remat": False},
        ),
        "optimizer": dict(learning_rate=1e-2),
        "train": dict(steps=6, log_every=1, eval_every=0, checkpoint_every=5),
        "mesh": dict(data=1, fsdp=1, tensor=1),
    }  # fmt: skip
    return {name: section | overrides.get(name, {}) if name != "task" else section for name, section in sections.items()}


SEGMENTS = {"loss": dict(segments=3, halt_weight=0.5, halt_exploration=0.5), "model": dict(halting=True)}


def segmented(**loss):
    base = config(model=SEGMENTS["model"])
    return base | {"loss": SEGMENTS["loss"] | loss}


@pytest.fixture(scope="module")
def measured():
    """A task with a fresh model, its evaluation on the test split, and what the model answers."""
    c = config()
    task = make_task(c)
    model = task.build_model(nnx.Rngs(0))
    summary = evaluate(*evaluation_of(c, task, model), "test")

    def answers(inputs):
        output = jax.jit(lambda inputs: model(inputs, solve=solve_of(c)))(np.pad(inputs, ((0, 3), (0, 0)))[:4])
        return np.asarray(output.logits, np.float64), output

    return task, summary, answers


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, {"loss": {"segments": 2}}], ids=["one segment", "two segments"])
def test_slots_change_no_score(measured, sections):
    """Four puzzles at a time through three slots: the numbers are those of whole batches, up to rounding."""
    c = config(**sections)
    task = make_task(c)
    model = task.build_model(nnx.Rngs(0))
    whole = evaluate(*evaluation_of(c, task, model), "test")
    queued = evaluate(*evaluation_of(c, task, model, slots=3), "test")
    for name in ("forward_nfe", "forward_nfe_9"):
        assert queued.pop(name) > whole.pop(name)
    assert queued == pytest.approx(whole, rel=1e-4) and whole["steps"] > 1


@pytest.mark.slow
def test_slots_need_a_solve(measured):
    """An unrolled iteration, which `eval_unrolled` asks for, has no samples that stop."""
    task, *_ = measured
    unrolled = evaluation_of(config(deq={"eval_unrolled": True}), task, task.build_model(nnx.Rngs(0)), slots=3)
    with pytest.raises(UserError, match=r"eval\.slots.*eval_unrolled"):
        evaluate(*unrolled, "test")


@pytest.mark.parametrize(("size", "suffix"), [(6, ""), (9, "_9")])
def test_every_puzzle_is_scored_once_at_its_size(measured, size, suffix):
    """The numbers are those of all five puzzles, though the last batch holds one and three copies."""
    task, summary, answers = measured
    examples = task.puzzles.test if size == 6 else task.puzzles.larger[9]
    logits = np.concatenate([answers(examples.inputs[:4])[0], answers(examples.inputs[4:])[0][:1]])
    right = logits.argmax(-1) == examples.targets
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, examples.targets[..., None].astype(int), -1))
    assert len(right) == 5
    np.testing.assert_allclose(summary[f"loss{suffix}"], nll.mean(), rtol=1e-4)
    np.testing.assert_allclose(summary[f"exact_match{suffix}"], right.all(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(summary[f"cell_accuracy{suffix}"], right.mean(), rtol=1e-6)


def test_the_residual_and_the_steps_stand_beside_the_score(measured):
    task, summary, answers = measured
    stats = [answers(part)[1].stats for part in (task.puzzles.test.inputs[:4], task.puzzles.test.inputs[4:])]
    for name, field in (("steps", "steps"), ("residual", "relative_residual"), ("converged", "converged")):
        values = np.concatenate([np.asarray(getattr(stats[0], field)), np.asarray(getattr(stats[1], field))[:1]])
        np.testing.assert_allclose(summary[name], values.mean(), rtol=1e-3)
    names = list(summary)
    assert names[:3] == ["loss", "exact_match", "cell_accuracy"] and names.index("converged") < names.index("loss_9")


def test_evaluations_of_f_are_counted_for_each_size(measured):
    """The solve of a batch ends with its slowest puzzle, which takes longer at one size than at another."""
    task, summary, answers = measured
    for suffix, examples in (("", task.puzzles.test), ("_9", task.puzzles.larger[9])):
        expected = [float(answers(part)[1].stats.nfe) for part in (examples.inputs[:4], np.repeat(examples.inputs[4:], 4, 0))]
        assert summary[f"forward_nfe{suffix}"] == np.mean(expected)


def test_stablemax_is_its_formula():
    """s(x) = x + 1 for x >= 0, else 1 / (1 - x) (Prieto et al. 2025, arXiv:2501.04697)."""
    task = make_task(config() | {"loss": {"cross_entropy": "stablemax"}})
    logits = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32) * 5
    targets = np.random.default_rng(1).integers(0, 2, (2, 6))
    score = np.where(logits >= 0, logits + 1, 1 / (1 - np.minimum(logits, 0)))
    p = score / score.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0]
    np.testing.assert_allclose(task._cross_entropy(jnp.asarray(logits), jnp.asarray(targets)), expected, rtol=1e-4)


@pytest.fixture(scope="module")
def working():
    """A task of three segments and its compiled loss."""
    c = segmented(halt_weight=0.0)
    task = make_task(c)
    model = task.build_model(nnx.Rngs(0))
    step = jax.jit(lambda batch, carry, key: task.loss(model, batch, carry, solve=solve_of(c), key=key)[1])
    return task, model, step


def batches(task, count):
    stream = task.train_batches(0)
    return [next(stream) for _ in range(count)]


def test_a_puzzle_stays_in_its_slot_for_all_segments_and_goes_on_from_its_state(working):
    task, model, step = working
    carry, seen = task.fresh_carry(model, 4), []
    given = batches(task, 4)
    for number, batch in enumerate(given):
        carry = step(batch, carry, jax.random.key(number)).carry
        seen.append(carry)
    np.testing.assert_array_equal([s.puzzle["inputs"] for s in seen[:3]], [given[0]["inputs"]] * 3)
    np.testing.assert_array_equal(seen[3].puzzle["inputs"], given[3]["inputs"])
    assert [s.segments_B.tolist() for s in seen] == [[1] * 4, [2] * 4, [3] * 4, [1] * 4]
    assert [bool(s.free_B.all()) for s in seen] == [False, False, True, False]
    again = jax.jit(lambda state: model(given[0]["inputs"], state, solve=solve_of(segmented())).state)(seen[0].state)
    np.testing.assert_allclose(seen[1].state, again, rtol=1e-3, atol=1e-4)


def test_slots_are_freed_one_by_one(working):
    """Only the slots that are free take the new puzzle, and only they start from a new state."""
    task, model, step = working
    first, second = batches(task, 2)
    carry = step(first, task.fresh_carry(model, 4), jax.random.key(0)).carry
    carry = carry._replace(free_B=jnp.array([True, False, True, False]))
    after = step(second, carry, jax.random.key(1)).carry
    expected = np.where([[True], [False], [True], [False]], second["inputs"], first["inputs"])
    np.testing.assert_array_equal(after.puzzle["inputs"], expected)
    assert after.segments_B.tolist() == [1, 2, 1, 2]


def test_the_halting_head_frees_slots_but_exploration_keeps_some():
    task = make_task(segmented(segments=4))
    many = jnp.full(4000, 5.0)
    done = jax.jit(lambda halt, count: task._done(halt, jnp.full(4000, count), jax.random.key(0)))
    assert not done(-many, 3).any() and done(-many, 4).all()
    shares = [done(many, count).mean() for count in (1, 2, 3, 4)]
    np.testing.assert_allclose(shares, [0.5, 0.5 + 0.5 / 3, 0.5 + 1 / 3, 1.0], atol=0.03)


def test_the_halting_loss_is_the_cross_entropy_of_being_right(measured):
    task = make_task(segmented())
    batch = {"inputs": jnp.zeros((4, 6), int), "targets": jnp.zeros((4, 6), int), "mask": jnp.ones(4)}
    logits = jnp.tile(jnp.array([1.0, -1.0]), (4, 6, 1)).at[2, 0].set(jnp.array([-1.0, 1.0]))  # the third is wrong
    halt = jnp.array([2.0, -1.0, 0.5, 3.0])
    value, output = jax.jit(lambda halt: task._scored(batch, PuzzleOutput(logits, None, halt, None, None), ()))(halt)
    p = 1 / (1 + np.exp(-np.asarray(halt)))
    nll = -np.log([p[0], p[1], 1 - p[2], p[3]])
    found = {name: float(m.total / m.count) for name, m in output.metrics.items()}
    np.testing.assert_allclose(value, found["loss"] + 0.5 * nll.mean(), rtol=1e-5)
    assert found["halted"] == 0.75 and found["halt_accuracy"] == 0.5 and found["exact_match"] == 0.75


def test_evaluation_works_through_all_segments():
    """Three segments of nine steps are one iteration of 27; the carry of training is left as it is."""
    deq = dict(eval_unrolled=True)
    c = config(deq=deq, model=SEGMENTS["model"]) | {"loss": SEGMENTS["loss"]}
    task = make_task(c)
    model = task.build_model(nnx.Rngs(0))
    batch, carry = task.eval_batches("valid")[0], task.fresh_carry(model, 4)
    _, output = jax.jit(lambda batch: task.loss(model, batch, carry, solve=solve_of(c)))(batch)
    long = config(deq=deq | {"eval_max_steps": 27})
    expected = jax.jit(lambda inputs: model(inputs, solve=solve_of(long)))(batch["inputs"])
    assert output.stats.steps.tolist() == [27.0] * 4 and output.stats.nfe == 30
    assert output.metrics["segments"].total / output.metrics["segments"].count == 3
    np.testing.assert_allclose(output.stats.relative_residual, expected.stats.relative_residual, rtol=0.05, atol=1e-6)
    assert isinstance(output.carry, Slots)
    jax.tree.map(np.testing.assert_array_equal, output.carry, carry)


@pytest.mark.slow
def test_a_resumed_run_with_slots_equals_an_uninterrupted_one(tmp_path):
    """On two devices, each with half of the slots."""
    base = segmented() | {"optimizer": dict(schedule="constant"), "mesh": dict(data=2, fsdp=1, tensor=1)}
    base["data"] |= {"test_sizes": ()}
    steps = lambda count: base | {"train": base["train"] | {"steps": count}}  # noqa: E731
    run(steps(3), tmp_path / "resumed")
    run(steps(5), tmp_path / "resumed")
    whole = run(steps(5), tmp_path / "whole")
    assert arrays(tmp_path / "resumed", 5) == arrays(tmp_path / "whole", 5)
    assert whole.step == 5 and set(whole.metrics) == {"valid", "test"}
    train = [line for line in metrics(tmp_path / "whole") if line["split"] == "train"]
    assert len(train) == 5 and all(np.isfinite(line["loss"]) for line in train)


def test_the_answer_of_the_lowest_residual_or_of_most_starts_counts(measured):
    """Against the starts solved one by one. Two applications of f: every start has a residual and an answer of its own."""
    c = config(deq=dict(eval_unrolled=True, eval_max_steps=2))
    task = make_task(c).with_restarts(5)
    model, batch = task.build_model(nnx.Rngs(0)), make_task(c).eval_batches("valid")[0]
    total, output = jax.jit(lambda batch: task.loss(model, batch, (), solve=solve_of(c)))(batch)
    run_one = jax.jit(lambda z0: model(batch["inputs"], z0, solve=solve_of(c)))
    starts = [run_one(model.initial_state(batch["inputs"], key)) for key in jax.random.split(jax.random.key(1), 5)]
    residuals = np.stack([start.stats.relative_residual for start in starts])
    answers = np.stack([np.argmax(start.logits, axis=-1) for start in starts])
    best = residuals.argmin(axis=0)
    np.testing.assert_allclose(output.stats.relative_residual, residuals.min(axis=0), rtol=1e-5)
    assert len(set(best.tolist())) > 1 and output.stats.nfe == sum(start.stats.nfe for start in starts)
    found = {name: float(m.total / m.count) for name, m in output.metrics.items()}
    exact, vote, agreement = [], [], []
    for b in range(3):  # the fourth is a copy that does not count
        texts = [answers[k, b].tobytes() for k in range(5)]
        most = max(map(texts.count, texts))
        voted = min((residuals[k, b], k) for k in range(5) if texts.count(texts[k]) == most)[1]
        exact.append((answers[best[b], b] == batch["targets"][b]).all())
        vote.append((answers[voted, b] == batch["targets"][b]).all())
        agreement.append(len(set(texts)) == 1)
    assert found["exact_match"] == pytest.approx(np.mean(exact))
    assert found["exact_match_vote"] == pytest.approx(np.mean(vote))
    assert found["agreement"] == pytest.approx(np.mean(agreement))
    assert np.isfinite(total)


def test_votes_decide_where_starts_differ():
    """Three starts, two of which agree on the right answer, but the third has the lowest residual."""
    task = make_task(config()).with_restarts(3)
    logits = jnp.zeros((3, 1, 6, 2)).at[:2, :, :, 1].set(1.0).at[2, :, :, 0].set(1.0)
    residuals = jnp.array([[0.3], [0.2], [0.1]])
    stats = SolverStats(
        nfe=jnp.ones(3), steps=residuals, relative_residual=residuals, absolute_residual=residuals, converged=residuals
    )
    outputs = iter([PuzzleOutput(logits, (), None, stats, None)])
    batch = {"inputs": jnp.zeros((1, 6), int), "targets": jnp.ones((1, 6), int)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "map", lambda f, keys: next(outputs))
        best, extra = jax.jit(lambda: task._from_many_starts(None, batch, None))()
    assert extra["exact_match_vote"].tolist() == [True] and extra["agreement"].tolist() == [False]
    assert best.logits[0].argmax(-1).tolist() == [0] * 6 and best.stats.nfe == 3


@pytest.mark.slow
def test_weights_of_another_puzzle_are_not_evaluated(tmp_path):
    """Neither by --mode eval nor for plots, which both load them; nothing is written."""
    run(config(train=dict(steps=1)), tmp_path / "run")
    c = resolve(config(data=dict(name="a5"), model=dict(input_symbols=60, output_symbols=60)))
    arguments = dict(phases=phases_of(c), mesh=c.mesh, options=c.eval, seed=0)
    with pytest.raises(UserError, match="has learned prefix_sums, not a5: leave out --config"):
        evaluate_checkpoint(task_of(c), tmp_path / "run", **arguments)
    assert make_task(config()).check_weights(to_dict(resolve(config()))) is None
    with pytest.raises(UserError, match="does not say what puzzle"):
        make_task(config()).check_weights(None)


def test_restarts_need_a_random_start():
    with pytest.raises(UserError, match=r"set model\.initial to normal"):
        make_task(config(model=dict(initial="zero"))).with_restarts(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": dict(name="maze", size=5, test_sizes=())}, "the puzzles have 2 axes, but model.axes is 1"),
        ({"model": dict(name="attention_reasoner", mixer="cells", cells=6, width=4)}, "no puzzles of size 9"),
        ({"model": dict(input_symbols=1)}, "model.input_symbols is 1, but the puzzles have 2"),
        ({"loss": dict(halt_weight=0.5)}, "set model.halting to True"),
        ({"loss": dict(segments=0)}, "loss.segments must be at least 1"),
        ({"loss": dict(halt_exploration=2.0)}, "is a probability"),
        ({"data": dict(batch_size=30)}, "fewer than a batch"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, message):
    base = config() | {"loss": {}}
    changed = {name: part | change.get(name, {}) if isinstance(part, dict) else part for name, part in base.items()}
    if "mixer" in changed["model"]:
        del changed["model"]["blocks"]
    with pytest.raises(UserError) as error:
        make_task(changed)
    assert message in str(error.value) and "\n" not in str(error.value)
