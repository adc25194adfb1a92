"""Mazes: mark the path from start to goal; learned on small ones, solved in larger ones by iterating longer.

    python -m deq_flax.main --config configs/maze.py[:VARIANT] --workdir DIR

| variant | what | exact match, published | measured |
|---|---|---|---|
| small | convolutional cell, mazes of 5 x 5 cells (side 11), 24 minutes of a core | none | 100; side 21: 98.0, 97.0, 99.6 |
| unique_eqr | Maze-Unique (side 30, paths of 100 to 140 steps) by the recipe of EqR | 82.2 in 16 segments | not trained here |
| unique_trm | the same by the recipe of TRM | 44.9 | not trained here |

The recipes of Maze-Unique are those of Huang et al. 2026 (arXiv:2605.21488), but for two things that deq_flax/published.py
names. They need an accelerator.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe
from deq_flax.published import EQR, TRM

BASE = {
    "task": "reasoning",
    "data": {
        "name": "maze",
        "size": 11,
        "test_sizes": (21,),
        "train_examples": 100_000,
        "valid_examples": 200,
        "test_examples": 500,
        "batch_size": 32,
    },
    "model": {"name": "conv_reasoner", "width": 32, "axes": 2},
    "deq": {
        "solver": "picard",
        "solver_options": {"relaxation": 0.5},  # of evaluation: plain iteration alternates between two states in larger mazes
        "tol": 1e-4,
        "max_steps": 40,
        "max_steps_jitter": 32,  # 8 to 40 steps
        "eval_max_steps": 300,
        "gradient": "unroll",
        "gradient_options": {"last": 8, "remat": False},
    },
    "optimizer": {"clip_norm": 1.0},
    "train": {"steps": 3000, "log_every": 50, "eval_every": 500, "checkpoint_every": 500},
}

_UNIQUE = {
    "data.size": 30,
    "data.test_sizes": (),
    "data.path_lengths": (100, 140),
    "data.valid_examples": 100,
    "data.test_examples": 1000,
    "data.eval_batch_size": 250,
    "model.width": 128,
    "model.heads": 8,
    "model.low_steps": 4,
    "train.steps": 100_000,
}

VARIANTS = {"small": {}, "unique_trm": TRM | _UNIQUE, "unique_eqr": EQR | _UNIQUE}


def get_config(variant: str = "small") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
