"""Sudoku: fill the board.

    python -m deq_flax.main --config configs/sudoku.py[:VARIANT] --workdir DIR

| variant | what | exact match, published | measured |
|---|---|---|---|
| four | boards of 4 x 4, one attention block, minutes on two CPU cores | none | 100 (each of three seeds) |
| four_trm | the same by TRM's recipe made small: two levels, segments, a halting head; three minutes | none | 99.5, 98.5, 100 |
| six | boards of 6 x 6, a gated layer over all cells, minutes on two CPU cores | none | 99.0 (each of three seeds) |
| nine | the same for boards of 9 x 9, of every grade that the generator makes, half an hour | none | 76, 66.5, 71.5 |
| extreme_eqr | Sudoku-Extreme, 1,000 puzzles and their symmetries, as EqR | 86.2 in 16 segments | not trained here |
| extreme_trm | the same as TRM | 84.3 | not trained here |

`extreme_*` read train.csv and test.csv of Sudoku-Extreme in data.path, and need an accelerator. Generated boards are not those
of Sudoku-Extreme: their scores cannot be compared. The published recipes are those of Jolicoeur-Martineau 2025
(arXiv:2510.04871) and Huang et al. 2026 (arXiv:2605.21488), but for two things that deq_flax/published.py names.

Boards of 6 x 6 and 9 x 9 have no clue to spare. Of 4 x 4 there are only 19 such boards that differ under their symmetries, two
or three of which would be the test set: those here have six clues.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe
from deq_flax.published import EQR, TRM

BASE = {
    "task": "reasoning",
    "data": {
        "name": "sudoku",
        "size": 4,
        "clues": 6,
        "train_examples": 2000,
        "valid_examples": 200,
        "test_examples": 200,
        "batch_size": 64,
        "augment": True,
    },
    "model": {"name": "attention_reasoner", "width": 64, "heads": 4, "positions": "grid"},
    "deq": {
        "solver": "picard",
        "tol": 1e-4,
        "max_steps": 20,
        "max_steps_jitter": 14,
        "eval_max_steps": 200,
        "gradient": "unroll",
        "gradient_options": {"last": 6, "remat": False},
    },
    "optimizer": {"clip_norm": 1.0, "warmup_steps": 50},
    "train": {"steps": 1500, "log_every": 50, "eval_every": 500, "checkpoint_every": 500},
}

_OVER_CELLS = {
    "data.clues": 0,
    "model.heads": 1,
    "model.mixer": "cells",
    "optimizer.learning_rate": 4e-3,
    "train.eval_every": 0,
}
_SMALL_TRM = {
    "model": {
        "name": "two_level_reasoner",
        "width": 64,
        "low_steps": 3,
        "mixer": "cells",
        "cells": 16,
        "initial": "zero",
        "halting": True,
    },
    "deq": TRM["deq"],
    "loss": TRM["loss"],
    "optimizer": {
        "name": "adamw",
        "learning_rate": 2e-3,
        "beta2": 0.95,
        "warmup_steps": 50,
        "schedule": "constant",
        "weight_decay": 0.1,
    },
    "train.steps": 1000,
    "train.eval_every": 0,
    "train.ema_decay": 0.99,
}
_EXTREME = {
    "data.name": "sudoku_csv",
    "data.path": "data/sudoku-extreme",
    "data.size": 9,
    "data.clues": 0,
    "data.valid_examples": 1000,
    "data.test_examples": 0,
    "data.eval_batch_size": 768,
    "model.width": 512,
    "model.blocks": 2,
    "model.mixer": "cells",
    "model.cells": 81,
    "train.steps": 50_000,
}

VARIANTS = {
    "four": {"optimizer.learning_rate": 3e-3},
    "six": _OVER_CELLS | {"data.size": 6, "model.cells": 36},
    "nine": _OVER_CELLS | {"data.size": 9, "model.cells": 81},
    "four_trm": _SMALL_TRM,
    "extreme_trm": TRM | _EXTREME,
    "extreme_eqr": EQR | _EXTREME,
}


def get_config(variant: str = "four") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
