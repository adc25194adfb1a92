"""MNIST, or Fashion-MNIST: a small MDEQ of two branches.

    python -m deq_flax.main --config configs/mnist.py --workdir DIR --config.data.path=FOLDER
    python -m deq_flax.main --config configs/mnist.py --workdir DIR --config.data.name=fashion_mnist --config.data.path=FOLDER

| what | test accuracy |
|---|---|
| mnist, less than ten minutes on two CPU cores | published: none; measured: see docs/recipes.md |
"""

from ml_collections import ConfigDict

BASE = {
    "task": "classification",
    "data": {
        "name": "mnist",
        "path": "data/mnist",
        "batch_size": 128,
        "eval_batch_size": 250,
        "augment": "crop",
        "pad": 2,
        "mean": (0.1307,),
        "std": (0.3081,),
        "valid_examples": 5000,
    },
    "model": {
        "name": "mdeq",
        "num_classes": 10,
        "in_channels": 1,
        "channels": (16, 32),
        "head_channels": (8, 16),
        "final_channels": 128,
        "downsample": 2,
        "expansion": 2,
        "groups": 4,
        "dropout": 0.1,
    },
    "deq": {"max_steps": 8, "backward_max_steps": 8, "pretrain_steps": 200, "pretrain_layers": 3},
    "optimizer": {"learning_rate": 3e-3, "clip_norm": 1.0, "weight_decay": 1e-5},
    "train": {"steps": 1000, "log_every": 50, "eval_every": 500, "checkpoint_every": 500},  # a bit more than two epochs
}


def get_config() -> ConfigDict:
    """The config, locked."""
    return ConfigDict(BASE).lock()
