"""State tracking: the product of every prefix of a sequence of permutations, learned from sequences of 16.

    python -m deq_flax.main --config configs/state_tracking.py[:VARIANT] --workdir DIR

| variant | what | exact match at length 128, published |
|---|---|---|
| a5 | even permutations of five things, 60 symbols | 98.1 (FPRM), 65.3 (TRM with halting) |
| s5 | all of them, 120 symbols | 98.8 (FPRM) |

The published numbers are those of models trained with other data and far more of it. Measured: see docs/reasoning.md.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

BASE = {
    "task": "reasoning",
    "data": {"name": "a5", "size": 16, "test_sizes": (32, 64, 128), "train_examples": 100_000},
    "model": {"name": "conv_reasoner", "width": 128},
    "deq": {
        "solver": "picard",
        "tol": 1e-4,
        "max_steps": 24,
        "max_steps_jitter": 14,
        "eval_max_steps": 500,
        "gradient": "unroll",
        "gradient_options": {"last": 10, "remat": False},
    },
    "optimizer": {"clip_norm": 1.0, "warmup_steps": 100},
    "train": {"steps": 4000, "eval_every": 500, "checkpoint_every": 500},
}

VARIANTS = {"a5": {}, "s5": {"data.name": "s5"}}


def get_config(variant: str = "a5") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
