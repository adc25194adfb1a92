"""CIFAR-10: the MDEQ classifiers of Bai et al. 2020 and 2021, and of Geng et al. 2021.

    python -m deq_flax.main --config configs/cifar10.py[:VARIANT] --workdir DIR --config.data.path=PATH

| variant | what | test accuracy, published | measured |
|---|---|---|---|
| large | four branches, 18 and 20 evaluations | 93.6 to 93.8 | not trained here |
| tiny | two branches of 24 channels, no augmentation | 87.1 | not trained here |
| large_reg | Jacobian regularization, 8 and 7 evaluations | 93.1 | not trained here |
| phantom | phantom gradient of 5 steps instead of the adjoint solve, SGD | 95.0 | not trained here |

Cost: 50 epochs for `tiny`, 220 for the others. As published, the test images also choose the best checkpoint; for a clean
estimate hold some out with --config.data.valid_examples=5000.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

BASE = {
    "task": "classification",
    "data": {
        "name": "cifar10",
        "path": "data/cifar10",
        "batch_size": 128,
        "eval_batch_size": 200,
        "augment": "crop_flip",
        "pad": 4,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
    },
    "model": {
        "name": "mdeq",
        "num_classes": 10,
        "channels": (32, 64, 128, 256),
        "head_channels": (14, 28, 56, 112),
        "final_channels": 1680,
        "dropout": 0.3,
    },
    "deq": {"max_steps": 18, "backward_max_steps": 20, "pretrain_steps": 20_000, "pretrain_layers": 10},
    "train": {"steps": 220 * 390, "eval_every": 3900, "checkpoint_every": 3900},
}

VARIANTS = {
    "large": {},
    "tiny": {
        "data.batch_size": 64,
        "data.augment": "none",
        "data.pad": 0,
        "model.channels": (24, 24),
        "model.head_channels": (8, 16),
        "model.final_channels": 200,
        "model.dropout": 0.25,
        "deq.pretrain_steps": 3_000,
        "optimizer.weight_decay": 2.5e-6,
        "train.steps": 50 * 781,
    },
    "large_reg": {
        "data.batch_size": 192,
        "model.dropout": 0.22,
        "deq.max_steps": 8,
        "deq.backward_max_steps": 7,
        "deq.max_steps_jitter": 2,
        "deq.jacobian_weight": 0.4,
        "deq.jacobian_frequency": 0.02,
        "deq.jacobian_stop": 90 * 260,
        "deq.pretrain_steps": 16_000,
        "deq.pretrain_layers": 8,
        "train.steps": 220 * 260,
    },
    "phantom": {
        "model.dropout": 0.0,
        "model.fuse_weight_norm": "all",
        "model.fuse_norm_affine": True,
        "deq.gradient": "phantom",
        "deq.gradient_options": {"steps": 5, "relaxation": 0.7},
        "deq.pretrain_steps": 0,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 1e-4,
    },
}
"""An epoch of 50,000 images is 390 batches of 128, 781 of 64, 260 of 192: those that do not fill a batch wait for the next."""


def get_config(variant: str = "large") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
