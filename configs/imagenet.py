"""ImageNet (ILSVRC 2012): the MDEQ classifiers of Bai et al. 2020 and 2021, and of TorchDEQ.

    python -m deq_flax.main --config configs/imagenet.py[:VARIANT] --workdir DIR --config.data.path=FOLDER

| variant | what | top-1 accuracy on the validation images, published | measured |
|---|---|---|---|
| small | 26 and 27 evaluations | 75.4 | not trained here |
| small_reg | Jacobian regularisation, 14 and 14 evaluations | 74.5 | not trained here |
| phantom | plain iteration, phantom gradient of 5 steps | 75.7 (20 evaluations), 73.6 (10) | not trained here |
| large | | 77.5 | not trained here |
| large_reg | Jacobian regularisation, 14 and 14 evaluations | 76.8 | not trained here |
| xl | | 79.2 | not trained here |

Cost: 100 epochs of 1.28M images of 224 x 224. The data: a folder or zip file of {train,val}/CLASS/*.JPEG, or ArrayRecord files
of TensorFlow Datasets. The damping of the phantom gradient is not published for this row.
"""

from ml_collections import ConfigDict

_REGULARISED = {"deq.max_steps": 14, "deq.backward_max_steps": 14, "deq.max_steps_jitter": 2, "model.fuse_norm_affine": False}

_LARGE = {
    "model.channels": (80, 160, 320, 640),
    "model.head_channels": (32, 64, 128, 256),
    "deq.pretrain_layers": 4,
    "optimizer.weight_decay": 1e-4,
}

VARIANTS = {
    "small": {},
    "small_reg": _REGULARISED
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
        "deq.phantom_steps": 5,
        "deq.pretrain_steps": 0,
    },
    "large": _LARGE,
    "large_reg": _LARGE
    | _REGULARISED
    | {"deq.jacobian_weight": 3.0, "deq.jacobian_frequency": 0.08, "deq.jacobian_increment_every": 50_000},
    "xl": _LARGE | {"model.channels": (88, 176, 352, 704), "model.expansion": 6},
}


def _base() -> ConfigDict:
    return ConfigDict(
        {
            "task": "classification",
            "data": {
                "name": "folders",
                "path": "data/imagenet",  # {train,val}/CLASS/*.JPEG, or *.array_record-*
                "batch_size": 128,
                "eval_batch_size": 128,
                "image_size": 224,  # of images in files, that they are cropped to; 0: those in memory stay as they are
                "resize": 256,  # of images in files: what the shorter side becomes before the central crop; 0: in memory
                "augment": "resized_crop_flip",  # none, crop, crop_flip; resized_crop_flip for images in files
                "pad": 0,  # pixels that a crop shifts by
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "valid_examples": 0,  # held out of the training images; 0: the test images validate
                "max_damaged": 20,  # damaged images that are skipped before giving up
                "pictures": 16,  # validation images to show with their predictions; 0: none
            },
            "model": {
                "num_classes": 1000,
                "channels": (32, 64, 128, 256),
                "head": "classification",
                "head_channels": (24, 48, 96, 192),
                "final_channels": 2048,
                "last_kernel": 1,  # segmentation's
                "in_channels": 3,
                "downsample": 2,
                "expansion": 5,
                "big_kernels": (),  # 5 for a branch, else 3; (): 3 for all
                "groups": 8,
                "fuse_norm_affine": True,
                "weight_norm": True,
                "fuse_weight_norm": "post",
                "dropout": 0.0,
                "norm_momentum": 0.1,
                "dtype": "float32",  # of the convolutions; the solver's state is float32 always
            },
            "deq": {
                "solver": "broyden",
                "tol": 1e-3,
                "max_steps": 26,
                "stop": "absolute",
                "memory": 0,  # iterates that Anderson combines, steps that Broyden keeps, both ways; 0: 6, and all
                "gradient": "implicit",  # or phantom, of a few damped steps; reversible; unroll, of all max_steps evaluations
                "backward_solver": "broyden",
                "backward_tol": 1e-3,
                "backward_max_steps": 27,
                "phantom_steps": 5,
                "phantom_damping": 0.5,
                "jacobian_weight": 0.0,
                "jacobian_frequency": 0.0,  # share of the steps that add the Jacobian loss
                "jacobian_increment": 0.1,  # added to the weight every ..
                "jacobian_increment_every": 0,  # .. so many steps; 0: never
                "jacobian_stop": 0,  # no Jacobian loss from this step on; 0: never stops
                "jacobian_through_equilibrium": False,  # differentiate it through the equilibrium as well
                "max_steps_jitter": 0,
                "pretrain_steps": 510_000,  # steps with the cell unrolled ..
                "pretrain_layers": 5,  # .. so many times, before the equilibrium
                "pretrain_jacobian_weight": 0.0,  # weight of the Jacobian loss there
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.05,
                "warmup_steps": 0,
                "schedule": "cosine",
                "clip_norm": 0.0,  # 0: none
                "weight_decay": 5e-5,
                "momentum": 0.9,  # sgd's
                "nesterov": True,  # sgd's
            },
            "train": {
                "steps": 100 * 10_009,  # epochs times batches
                "seed": 0,
                "log_every": 200,
                "eval_every": 10009,
                "checkpoint_every": 10009,
                "accumulate": 1,  # micro-batches to a step; batch_size counts all of them
                "ema_decay": 0.0,  # running average of the parameters, for evaluation; 0: none
                "max_skipped": 10,  # non-finite steps in a row that are skipped before giving up
            },
            "eval": {
                "spectral_radius": False,  # report that of f at the equilibria of the first batch
                "max_steps_sweep": (),  # limits on evaluations to evaluate with besides, for a table of score against them
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: the devices that are left
            "checkpoint": {"keep_latest": 2, "keep_best": 1, "init_from": ""},
        }
    )


def get_config(variant: str = "small") -> ConfigDict:
    """The config of a variant, locked."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of imagenet; known: {', '.join(VARIANTS)}")
    config = _base()
    config.update_from_flattened_dict(VARIANTS[variant])
    return config.lock()
