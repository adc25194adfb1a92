"""Published recipes that several configs share: parts of a variant, to which a config adds what is its own.

TRM: Jolicoeur-Martineau 2025, arXiv:2510.04871. EqR: Huang et al. 2026, arXiv:2605.21488. Two things differ from them: Adam is
AdamW, not its variant with the arctangent, and EqR's noise is added after every cycle of both levels, not after every update of
one.
"""

from typing import Any

_UNROLLED = {"last": 1, "remat": False}

_BOTH: dict[str, Any] = {
    "model": {"name": "two_level_reasoner", "inner_multiple": 256, "halting": True, "dtype": "bfloat16"},
    "deq": {
        "solver": "picard",
        "max_steps": 3,
        "eval_unrolled": True,
        "gradient": "unroll",
        "gradient_options": _UNROLLED,
    },
    "loss": {"cross_entropy": "stablemax", "segments": 16, "halt_weight": 0.5},
    "optimizer": {
        "name": "adamw",
        "learning_rate": 1e-4,
        "beta2": 0.95,
        "warmup_steps": 2000,
        "schedule": "constant",
        "weight_decay": 1.0,
    },
    "train": {"ema_decay": 0.999, "eval_every": 5000},
    "data.train_examples": 1000,
    "data.batch_size": 768,
}

TRM = _BOTH | {"model.initial": "zero"}
"""The recipe of TRM; a config adds the width of the model, what its puzzle needs of it, and `train.steps`."""

EQR = _BOTH | {"model.relaxation": 0.95, "deq.gradient_options": _UNROLLED | {"noise": 0.01}}
"""The recipe of EqR: that of TRM with relaxation, random initial states and noise."""
