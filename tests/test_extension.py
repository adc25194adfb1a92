"""Additions trained from a config: a solver, a gradient, a model, a text and a set of images, each a class or a function with a
line in its table; and a key of section `deq`, a field of its dataclass.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_flax import config as sections
from deq_flax.config import resolve
from deq_flax.data.images.files import DamagedFiles
from deq_flax.data.images.labeled import ArrayExamples
from deq_flax.data.images.labeled_datasets import LABELED, ImageData
from deq_flax.data.text.corpus import TEXTS, Corpus
from deq_flax.equilibrium import GRADIENTS, SOLVERS
from deq_flax.equilibrium.gradients.base import attach, stopped
from deq_flax.equilibrium.loop import solve as run_loop
from deq_flax.errors import UserError
from deq_flax.models import MODELS
from deq_flax.models.language_model import TransformerLanguageModel
from deq_flax.models.model import LanguageOutput
from deq_flax.nn.linear import Linear
from deq_flax.train.phases import DEQOptions, make_phases
from tests.equilibrium.problems import HeavyBall
from tests.tasks.images import classification
from tests.train.commands import metrics
from tests.train.small import config, run, write_tokens


@dataclass(frozen=True)
class ScaledOneStep:
    """The gradient of one evaluation at z*, times a factor."""

    factor: float = 1.0

    def __call__(self, f, x0, solver, max_steps, probe):
        x, stats = run_loop(stopped(f), x0, solver, max_steps)
        return attach(x, self.factor * f(x)), stats


class NoMemory(NamedTuple):
    length_B: jax.Array


class Bag(TransformerLanguageModel):
    """The equilibrium of z = tanh(W z) / 2 + embedding: no attention, no memory."""

    has_equilibrium = True

    def __init__(self, options, *, rngs):
        super().__init__(options, rngs=rngs)
        self.state = Linear(options.d_model, options.d_model, rngs=rngs)
        self.tie(rngs)

    def fresh_memory(self, batch_size):
        return NoMemory(jnp.zeros(batch_size, jnp.int32))

    def equation(self, tokens_BL, memory, key=None):
        x_BLD = self.embed(tokens_BL, key)
        return (lambda z_BLD: 0.5 * jnp.tanh(self.state(z_BLD)) + x_BLD), jnp.zeros_like(x_BLD)

    def __call__(self, tokens_BL, memory, *, solve=None, key=None):
        solution, jacobian_loss = solve(*self.equation(tokens_BL, memory, key))
        return LanguageOutput(solution.value, memory, solution.stats, jacobian_loss)


def counting(options, vocab_size):
    """A text that counts from 0 to 9 again and again."""
    splits = {split: np.tile(np.arange(10, dtype=np.int32), 40) for split in ("train", "valid", "test")}
    return Corpus(**splits, vocab_size=vocab_size or 10)


def shades(options):
    """Images of three shades, 12 of each to train on."""
    random = np.random.default_rng(0)

    def examples(count):
        labels = np.arange(3 * count, dtype=np.int32) % 3
        noise = random.integers(-20, 20, (3 * count, 8, 8, 3))
        return ArrayExamples(images_NHWC=(40 + 80 * labels[:, None, None, None] + noise).astype(np.uint8), labels_N=labels)

    splits = {"train": examples(12), "valid": examples(4), "test": examples(4)}
    return ImageData(**splits, class_names=("dark", "gray", "light"), damaged=DamagedFiles(options.max_damaged))


@dataclass(frozen=True, kw_only=True)
class MoreOptions(DEQOptions):
    """Section `deq` with one more key."""

    training_tol: float = 0.0
    """Residual at which a forward solve of training stops; 0: tol."""

    def training_solver(self):
        return replace(super().training_solver(), tol=self.training_tol or self.tol)


ONE_PHASE = {"deq": {"pretrain_steps": 0, "jacobian_weight": 0.0}}
SELDOM = {"log_every": 10, "eval_every": 0, "checkpoint_every": 40, "ema_decay": 0.0}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokens").mkdir()
    return write_tokens(tmp_path / "tokens")


def lines(c, workdir):
    run(c, workdir)
    return [line for line in metrics(workdir) if line["split"] == "train"]


@pytest.mark.slow
def test_a_solver_and_a_gradient(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(SOLVERS, "heavy_ball", HeavyBall)
    monkeypatch.setitem(GRADIENTS, "scaled", ScaledOneStep)
    deq = {"solver": "heavy_ball", "solver_options": {"momentum": 0.1}, "gradient": "scaled", "gradient_options": {"factor": 2}}
    c = config(folder, deq=deq | ONE_PHASE["deq"], train={"steps": 2})
    phase = make_phases(resolve(c).deq).phase(0)
    assert phase.solver == HeavyBall(tol=1e-3, max_steps=8, momentum=0.1) and phase.gradient == ScaledOneStep(factor=2.0)
    found = lines(c, tmp_path / "run")
    assert len(found) == 2 and np.isfinite(found[-1]["grad_norm"]) and found[0]["forward_nfe"] > 1


@pytest.mark.slow
def test_a_key_of_section_deq(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "DEQOptions", MoreOptions)
    c, override = config(folder, **ONE_PHASE, train={"steps": 2}), [("deq.training_tol", "0.3")]
    assert "`training_tol`" in sections.reference()
    with pytest.raises(UserError, match=r"--config\.deq\.training_tol must be a number, not 'tight'"):
        resolve(c, [("deq.training_tol", "tight")])
    tight, loose = lines(c, tmp_path / "tight"), lines(resolve(c, override), tmp_path / "loose")
    assert 1 < loose[0]["forward_nfe"] < tight[0]["forward_nfe"]


@pytest.mark.slow
def test_a_set_of_images(tmp_path, monkeypatch):
    monkeypatch.setitem(LABELED, "shades", shades)
    data = {"name": "shades", "path": "", "image_size": 0, "resize": 0, "augment": "none"}
    found = lines(classification(tmp_path, **ONE_PHASE, data=data, train={"steps": 30} | SELDOM), tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.slow
def test_a_model(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "bag", Bag)
    c = config(folder, **ONE_PHASE, model={"name": "bag", "mem_len": 0}, train={"steps": 30} | SELDOM)
    found = lines(c, tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"] and found[-1]["forward_residual"] < 1e-2


@pytest.mark.slow
def test_a_text(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(TEXTS, "counting", counting)
    data, model = {"name": "counting"}, {"vocab_size": 0, "cutoffs": ()}
    c = config(folder, **ONE_PHASE, data=data, model=model, train={"steps": 40} | SELDOM)
    found = lines(c, tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]
