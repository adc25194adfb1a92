"""Cityscapes, 19 classes: the MDEQ segmentation models of Bai et al. 2020.

    python -m deq_flax.main --config configs/cityscapes.py[:VARIANT] --workdir DIR --config.data.path=FOLDER \\
        --config.checkpoint.init_from=IMAGENET_WORKDIR

| variant | what | mIoU on the validation images, published | measured |
|---|---|---|---|
| small | | none | not trained here |
| large | | 77.8 | not trained here |
| xl | crops of 1024 x 768 | 80.3 | not trained here |

Cost: 500 epochs of 2,975 images. The published models start from the ImageNet model of the same name. Images are evaluated
whole, 2048 x 1024, at one scale. Online hard example mining, optional there: --config.loss.hard_threshold=0.9. Published
tolerances: an absolute residual of 1e-3 in both solves. The adjoint's is relative here, 1e-3 too.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

CLASS_WEIGHTS = (
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754,
    1.0489, 0.8786, 1.0023, 0.9539, 0.9843, 1.1116, 0.9037,
    1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
)  # fmt: skip

BASE = {
    "task": "segmentation",
    "data": {
        "name": "cityscapes",
        "path": "data/cityscapes",
        "batch_size": 12,
        "eval_batch_size": 2,
        "crop_size": (512, 1024),
        "eval_size": (1024, 2048),
        "max_damaged": 5,
    },
    "model": {
        "name": "mdeq",
        "num_classes": 19,
        "channels": (32, 64, 128, 256),
        "head": "segmentation",
        "downsample": 2,
        "fuse_norm_affine": True,
        "dropout": 0.05,
    },
    "deq": {"max_steps": 27, "stop": "absolute", "pretrain_steps": 60_000, "pretrain_layers": 3},
    "loss": {"class_weights": CLASS_WEIGHTS},
    "optimizer": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 2e-4},
    "train": {"steps": 500 * 247, "log_every": 50, "eval_every": 2470, "checkpoint_every": 2470},
}

_LARGE = {
    "model.channels": (80, 160, 320, 640),
    "model.dropout": 0.03,
    "optimizer.weight_decay": 3e-4,
}

VARIANTS = {
    "small": {},
    "large": _LARGE,
    "xl": _LARGE
    | {
        "data.crop_size": (768, 1024),
        "data.batch_size": 8,
        "model.channels": (88, 176, 352, 704),
        "model.expansion": 6,
        "model.dropout": 0.04,
        "deq.pretrain_steps": 40_000,
        "train.steps": 500 * 371,
    },
}


def get_config(variant: str = "small") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
