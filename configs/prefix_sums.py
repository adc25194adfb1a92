"""Prefix sums: the parity of every prefix of a string of bits, learned from strings of 32.

    python -m deq_flax.main --config configs/prefix_sums.py --workdir DIR

A layer of convolutions is iterated to its fixed point; longer strings take more iterations. Trained on a random number of free
steps from a random start, then ten that are differentiated (Bansal et al. 2022, arXiv:2202.05826; Anil et al. 2022,
arXiv:2211.09961).

Cost: two minutes on two CPU cores. Measured: see docs/reasoning.md.
"""

from ml_collections import ConfigDict

BASE = {
    "task": "reasoning",
    "data": {
        "name": "prefix_sums",
        "size": 32,
        "test_sizes": (64, 128, 512),
    },
    "model": {"name": "conv_reasoner", "width": 48},
    "deq": {
        "solver": "picard",
        "tol": 1e-4,
        "max_steps_jitter": 20,  # 10 to 30 steps
        "eval_max_steps": 1000,
        "gradient": "unroll",
        "gradient_options": {"last": 10, "remat": False},
    },
    "optimizer": {"clip_norm": 1.0},
    "train": {"steps": 500, "log_every": 20, "eval_every": 250, "checkpoint_every": 250},
}


def get_config() -> ConfigDict:
    """The config, locked."""
    return ConfigDict(BASE).lock()
