"""State tracking: the product of every prefix of a sequence of permutations, learned from longer and longer sequences.

    python -m deq_flax.main --config configs/state_tracking.py --workdir FOUR
    python -m deq_flax.main --config configs/state_tracking.py:a5_8 --workdir EIGHT --config.checkpoint.init_from=FOUR
    python -m deq_flax.main --config configs/state_tracking.py:a5_16 --workdir SIXTEEN --config.checkpoint.init_from=EIGHT
    python -m deq_flax.main --config configs/state_tracking.py:a5_32 --workdir DIR --config.checkpoint.init_from=SIXTEEN

| variant | what | exact match at length 128, published |
|---|---|---|
| a5, a5_8, a5_16, a5_32 | even permutations of five, 60 symbols | 98.1 (FPRM), 65.3 (TRM with halting) |
| s5, s5_8, s5_16, s5_32 | all of them, 120 symbols | 98.8 (FPRM) |
| transformer, and so on to _16 | a5 by a Transformer of four blocks, to stand beside it | |

The published numbers are those of models trained with other data and far more of it. Measured: docs/reasoning.md.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

BASE = {
    "task": "reasoning",
    "data": {
        "name": "a5",
        "size": 4,
        "test_sizes": (8, 16, 32),
        "train_examples": 100_000,
        "valid_examples": 100,
        "test_examples": 100,
        "batch_size": 64,
    },
    "model": {"name": "conv_reasoner", "width": 128, "kernel": 2, "blocks": 0, "gated": True, "causal": True},
    "deq": {
        "solver": "picard",
        "tol": 1e-4,
        "max_steps": 10,
        "max_steps_jitter": 5,  # 5 to 10 steps
        "eval_max_steps": 300,
        "gradient": "unroll",
        "gradient_options": {"last": 4, "remat": False},
    },
    "optimizer": {"clip_norm": 1.0, "learning_rate": 8e-3, "warmup_steps": 100},
    "train": {"steps": 4000, "log_every": 50},
}

_EIGHT = {
    "data.size": 8,
    "data.test_sizes": (16, 32, 64, 128),
    "deq.max_steps": 20,
    "deq.max_steps_jitter": 12,  # 8 to 20 steps
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 20,
    "train.steps": 2000,
    "train.eval_every": 0,
    "train.checkpoint_every": 500,
}
_SIXTEEN = _EIGHT | {
    "data.size": 16,
    "data.test_sizes": (32, 64, 128, 256),
    "deq.max_steps": 36,
    "deq.max_steps_jitter": 20,  # 16 to 36 steps
    "optimizer.learning_rate": 1e-3,
}
_THIRTY_TWO = _EIGHT | {
    "data.size": 32,
    "data.test_sizes": (64, 128, 256),
    "data.batch_size": 32,
    "deq.max_steps": 64,
    "deq.max_steps_jitter": 30,  # 34 to 64 steps
    "deq.eval_max_steps": 400,
    "optimizer.learning_rate": 7e-4,
    "train.steps": 1000,
}
_TRANSFORMER = {
    "model": {"name": "attention_reasoner", "width": 60, "heads": 3, "blocks": 4, "initial": "zero"},
    "deq.max_steps": 1,
    "deq.max_steps_jitter": 0,
    "deq.eval_max_steps": 1,
    "deq.eval_unrolled": True,
    "deq.gradient_options": {"remat": False},
    "optimizer.learning_rate": 2e-3,  # at 8e-3 it learns the first state alone
}

VARIANTS = {
    "a5": {},
    "a5_8": _EIGHT,
    "a5_16": _SIXTEEN,
    "a5_32": _THIRTY_TWO,
    "s5": {"data.name": "s5", "train.steps": 5000},
    "s5_8": _EIGHT | {"data.name": "s5"},
    "s5_16": _SIXTEEN | {"data.name": "s5"},
    "s5_32": _THIRTY_TWO | {"data.name": "s5"},
    "transformer": _TRANSFORMER,
    "transformer_8": _EIGHT | _TRANSFORMER,
    "transformer_16": _SIXTEEN | _TRANSFORMER,
}


def get_config(variant: str = "a5") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
