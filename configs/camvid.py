"""CamVid, 11 classes: a small MDEQ of three branches on street scenes of 480 x 360.

    python -m deq_flax.main --config configs/camvid.py --workdir DIR --config.data.path=FOLDER

| variant | what | test mIoU |
|---|---|---|
| base | 30,000 steps, for an accelerator | published: none for an MDEQ; not trained here |
| short | 240 steps at a quarter of the resolution, on two CPU cores | measured: see docs/recipes.md |
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

BASE = {
    "task": "segmentation",
    "data": {
        "name": "camvid",
        "path": "data/camvid",
        "batch_size": 8,
        "eval_batch_size": 4,
        "crop_size": (360, 480),
        "eval_size": (360, 480),
    },
    "model": {
        "name": "mdeq",
        "num_classes": 11,
        "channels": (32, 64, 128),
        "head": "segmentation",
        "downsample": 2,
        "dropout": 0.05,
    },
    "deq": {"max_steps": 18, "backward_max_steps": 20, "pretrain_steps": 3000, "pretrain_layers": 3},
    "optimizer": {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9, "clip_norm": 5.0, "weight_decay": 2e-4},
    "train": {"steps": 30_000, "log_every": 50},
}

VARIANTS = {
    "base": {},
    "short": {
        "data.batch_size": 4,
        "data.crop_size": (96, 128),
        "data.scales": (0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
        "data.eval_scales": (0.35,),
        "model.channels": (16, 32, 32),
        "model.expansion": 2,
        "model.dropout": 0.0,
        "deq.max_steps": 8,
        "deq.backward_max_steps": 8,
        "deq.pretrain_steps": 80,
        "optimizer.name": "adam",
        "optimizer.learning_rate": 3e-3,
        "optimizer.momentum": 0.0,
        "optimizer.weight_decay": 1e-5,
        "train.steps": 240,
        "train.log_every": 20,
        "train.eval_every": 80,
        "train.checkpoint_every": 80,
    },
}


def get_config(variant: str = "base") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
