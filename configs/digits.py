"""Handwritten digits that come with scikit-learn, 8 x 8 pixels: nothing is downloaded.

    python -m deq_flax.main --config configs/digits.py --workdir DIR

1,300 images to train on, 137 to choose the best checkpoint by, and 360 by other writers to test on.

| what | test accuracy |
|---|---|
| an MDEQ of two branches, about two minutes on two CPU cores | published: none; measured: see docs/recipes.md |
"""

from ml_collections import ConfigDict

BASE = {
    "task": "classification",
    "data": {
        "name": "digits",
        "batch_size": 64,
        "eval_batch_size": 137,
        "augment": "crop",
        "pad": 1,
        "mean": (0.3,),
        "std": (0.37,),
        "valid_examples": 137,
    },
    "model": {
        "name": "mdeq",
        "num_classes": 10,
        "in_channels": 1,
        "channels": (16, 16),
        "head_channels": (8, 16),
        "final_channels": 64,
        "expansion": 2,
        "groups": 4,
        "dropout": 0.1,
    },
    "deq": {"max_steps": 8, "backward_max_steps": 8, "pretrain_steps": 100, "pretrain_layers": 3},
    "optimizer": {"learning_rate": 4e-3, "clip_norm": 1.0, "weight_decay": 1e-5},
    "train": {"steps": 260, "log_every": 20, "eval_every": 130, "checkpoint_every": 130},  # 13 epochs
}


def get_config() -> ConfigDict:
    """The config, locked."""
    return ConfigDict(BASE).lock()
