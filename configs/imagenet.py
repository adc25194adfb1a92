"""ImageNet (ILSVRC 2012): the MDEQ classifiers of Bai et al. 2020 and 2021, and of TorchDEQ.

    python -m deq_flax.main --config configs/imagenet.py[:VARIANT] --workdir DIR --config.data.path=FOLDER

| variant | what | top-1 accuracy on the validation images, published | measured |
|---|---|---|---|
| small | 26 and 27 evaluations | 75.4 | not trained here |
| small_reg | Jacobian regularization, 14 and 14 evaluations | 74.5 | not trained here |
| phantom | plain iteration, phantom gradient of 5 steps | 75.7 (20 evaluations), 73.6 (10) | not trained here |
| large | | 77.5 | not trained here |
| large_reg | Jacobian regularization, 14 and 14 evaluations | 76.8 | not trained here |
| xl | | 79.2 | not trained here |

Cost: 100 epochs of 1.28M images of 224 x 224. The data: a folder or zip file of {train,val}/CLASS/*.JPEG, or ArrayRecord files
of TensorFlow Datasets. The relaxation of the phantom gradient is not published for this row. Published tolerances: an absolute
residual of 1e-3 in both solves. The adjoint's is relative here, 1e-3 too: an absolute one depends on the scale of the loss.
"""

from ml_collections import ConfigDict

from deq_flax.config import recipe

BASE = {
    "task": "classification",
    "data": {
        "name": "folders",
        "path": "data/imagenet",
        "batch_size": 128,
        "eval_batch_size": 128,
        "image_size": 224,
        "resize": 256,
        "augment": "resized_crop_flip",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "max_damaged": 20,
    },
    "model": {
        "name": "mdeq",
        "num_classes": 1000,
        "channels": (32, 64, 128, 256),
        "head_channels": (24, 48, 96, 192),
        "final_channels": 2048,
        "downsample": 2,
        "fuse_norm_affine": True,
    },
    "deq": {"max_steps": 26, "stop": "absolute", "backward_max_steps": 27, "pretrain_steps": 510_000, "pretrain_layers": 5},
    "optimizer": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-5},
    "train": {"steps": 100 * 10_009, "log_every": 200, "eval_every": 10_009, "checkpoint_every": 10_009},
}

_REGULARIZED = {"deq.max_steps": 14, "deq.backward_max_steps": 14, "deq.max_steps_jitter": 2, "model.fuse_norm_affine": False}

_LARGE = {
    "model.channels": (80, 160, 320, 640),
    "model.head_channels": (32, 64, 128, 256),
    "deq.pretrain_layers": 4,
    "optimizer.weight_decay": 1e-4,
}

VARIANTS = {
    "small": {},
    "small_reg": _REGULARIZED
    | {
        "model.head_channels": (28, 56, 112, 224),
        "model.dropout": 0.02,
        "deq.jacobian_weight": 2.5,
        "deq.jacobian_frequency": 0.08,
        "deq.jacobian_increment_every": 50_000,
        "deq.pretrain_jacobian_weight": 0.03,
        "optimizer.learning_rate": 0.04,
        "optimizer.weight_decay": 2e-5,
    },
    "phantom": {
        "model.fuse_weight_norm": "none",
        "deq.solver": "picard",
        "deq.gradient": "phantom",
        "deq.gradient_options": {"steps": 5, "relaxation": 0.5},
        "deq.pretrain_steps": 0,
    },
    "large": _LARGE,
    "large_reg": _LARGE
    | _REGULARIZED
    | {"deq.jacobian_weight": 3.0, "deq.jacobian_frequency": 0.08, "deq.jacobian_increment_every": 50_000},
    "xl": _LARGE | {"model.channels": (88, 176, 352, 704), "model.expansion": 6},
}


def get_config(variant: str = "small") -> ConfigDict:
    """The config of a variant, locked."""
    return recipe(BASE, VARIANTS, variant)
