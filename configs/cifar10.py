"""CIFAR-10: the MDEQ classifiers of Bai et al. 2020 and 2021, and of Geng et al. 2021.

    python -m deq_flax.main --config configs/cifar10.py[:VARIANT] --workdir DIR --config.data.path=PATH

| variant | what | test accuracy, published | measured |
|---|---|---|---|
| large | four branches, 18 and 20 evaluations | 93.6 to 93.8 | not trained here |
| tiny | two branches of 24 channels, no augmentation | 87.1 | not trained here |
| large_reg | Jacobian regularisation, 8 and 7 evaluations | 93.1 | not trained here |
| phantom | phantom gradient of 5 steps instead of the adjoint solve, SGD | 95.0 | not trained here |

Cost: 50 epochs for `tiny`, 220 for the others. As published, the test images also choose the best checkpoint; for a clean
estimate hold some out with --config.data.valid_examples=5000.
"""

from ml_collections import ConfigDict

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
        "deq.phantom_steps": 5,
        "deq.phantom_damping": 0.7,
        "deq.pretrain_steps": 0,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 1e-4,
    },
}
"""An epoch of 50,000 images is 390 batches of 128, 781 of 64, 260 of 192: those that do not fill a batch wait for the next."""


def _base() -> ConfigDict:
    return ConfigDict(
        {
            "task": "classification",
            "data": {
                "name": "cifar10",
                "path": "data/cifar10",  # the folder of the batches, or images as a folder or zip
                "batch_size": 128,
                "eval_batch_size": 200,
                "image_size": 0,  # of images in files, that they are cropped to; 0: those in memory stay as they are
                "resize": 0,  # of images in files: what the shorter side becomes before the central crop; 0: in memory
                "augment": "crop_flip",  # none, crop, crop_flip; resized_crop_flip for images in files
                "pad": 4,  # pixels that a crop shifts by
                "mean": (0.4914, 0.4822, 0.4465),
                "std": (0.2023, 0.1994, 0.2010),
                "valid_examples": 0,  # held out of the training images; 0: the test images validate
                "max_damaged": 0,  # damaged images that are skipped before giving up
                "pictures": 16,  # validation images to show with their predictions; 0: none
            },
            "model": {
                "num_classes": 10,
                "channels": (32, 64, 128, 256),
                "head": "classification",
                "head_channels": (14, 28, 56, 112),
                "final_channels": 1680,
                "last_kernel": 1,  # segmentation's
                "in_channels": 3,
                "downsample": 0,
                "expansion": 5,
                "big_kernels": (),  # 5 for a branch, else 3; (): 3 for all
                "groups": 8,
                "fuse_norm_affine": False,
                "weight_norm": True,
                "fuse_weight_norm": "post",
                "dropout": 0.3,
                "norm_momentum": 0.1,
                "dtype": "float32",  # of the convolutions; the solver's state is float32 always
            },
            "deq": {
                "solver": "broyden",
                "tol": 1e-3,
                "max_steps": 18,
                "stop": "relative",
                "memory": 0,  # iterates that Anderson combines, steps that Broyden keeps, both ways; 0: 6, and all
                "gradient": "implicit",  # or phantom, of a few damped steps; reversible; unroll, of all max_steps evaluations
                "backward_solver": "broyden",
                "backward_tol": 1e-3,
                "backward_max_steps": 20,
                "phantom_steps": 5,
                "phantom_damping": 0.5,
                "jacobian_weight": 0.0,
                "jacobian_frequency": 0.0,  # share of the steps that add the Jacobian loss
                "jacobian_increment": 0.1,  # added to the weight every ..
                "jacobian_increment_every": 0,  # .. so many steps; 0: never
                "jacobian_stop": 0,  # no Jacobian loss from this step on; 0: never stops
                "jacobian_through_equilibrium": False,  # differentiate it through the equilibrium as well
                "max_steps_jitter": 0,
                "pretrain_steps": 20_000,  # steps with the cell unrolled ..
                "pretrain_layers": 10,  # .. so many times, before the equilibrium
                "pretrain_jacobian_weight": 0.0,  # weight of the Jacobian loss there
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 1e-3,
                "warmup_steps": 0,
                "schedule": "cosine",
                "clip_norm": 0.0,  # 0: none
                "weight_decay": 0.0,
                "momentum": 0.0,  # sgd's
                "nesterov": False,  # sgd's
            },
            "train": {
                "steps": 220 * 390,  # epochs times batches
                "seed": 0,
                "log_every": 100,
                "eval_every": 3900,
                "checkpoint_every": 3900,
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


def get_config(variant: str = "large") -> ConfigDict:
    """The config of a variant, locked."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of cifar10; known: {', '.join(VARIANTS)}")
    config = _base()
    config.update_from_flattened_dict(VARIANTS[variant])
    return config.lock()
