"""Cityscapes, 19 classes: the MDEQ segmentation models of Bai et al. 2020.

    python -m deq_flax.main --config configs/cityscapes.py[:VARIANT] --workdir DIR --config.data.path=FOLDER \\
        --config.checkpoint.init_from=IMAGENET_WORKDIR

| variant | what | mIoU on the validation images, published | measured |
|---|---|---|---|
| small | | none | not trained here |
| large | | 77.8 | not trained here |
| xl | crops of 1024 x 768 | 80.3 | not trained here |

Cost: 500 epochs of 2,975 images. The published models start from the ImageNet model of the same name. Images are evaluated
whole, 2048 x 1024, at one scale. Online hard example mining, optional there: --config.loss.hard_threshold=0.9.
"""

from ml_collections import ConfigDict

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


def _base() -> ConfigDict:
    return ConfigDict(
        {
            "task": "segmentation",
            "data": {
                "name": "cityscapes",
                "path": "data/cityscapes",  # the folder of leftImg8bit and gtFine, or of train.lst and val.lst
                "batch_size": 12,
                "eval_batch_size": 2,
                "crop_size": (512, 1024),  # height and width of training crops
                "scales": tuple(tenths / 10 for tenths in range(5, 22)),  # a training image is enlarged by one
                "ignored": (),  # with data.name folders: labels that count for nothing
                "eval_size": (1024, 2048),  # height and width of whole images; smaller ones are filled up
                "eval_scales": (1.0,),  # sizes to look at an image in, the probabilities averaged
                "eval_flip": False,  # look at it mirrored too
                "eval_window": (0, 0),  # slide a window of this height and width over it; 0, 0: the whole at once
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "max_damaged": 5,  # damaged images that are skipped before giving up
                "pictures": 4,  # validation images to show with their predictions; 0: none
            },
            "model": {
                "num_classes": 19,
                "channels": (32, 64, 128, 256),
                "head": "segmentation",
                "head_channels": (),  # classification's
                "final_channels": 0,  # classification's
                "last_kernel": 1,
                "in_channels": 3,
                "downsample": 2,
                "expansion": 5,
                "big_kernels": (),  # 5 for a branch, else 3; (): 3 for all
                "groups": 8,
                "fuse_norm_affine": True,
                "weight_norm": True,
                "fuse_weight_norm": "post",
                "dropout": 0.05,
                "norm_momentum": 0.1,
                "dtype": "float32",  # of the convolutions; the solver's state is float32 always
            },
            "deq": {
                "solver": "broyden",
                "tol": 1e-3,
                "max_steps": 27,
                "stop": "absolute",
                "memory": 0,  # iterates that Anderson combines, steps that Broyden keeps, both ways; 0: 6, and all
                "gradient": "implicit",  # or phantom, of a few damped steps; reversible; unroll, of all max_steps evaluations
                "backward_solver": "broyden",
                "backward_tol": 1e-3,
                "backward_max_steps": 30,
                "phantom_steps": 5,
                "phantom_damping": 0.5,
                "jacobian_weight": 0.0,
                "jacobian_frequency": 0.0,  # share of the steps that add the Jacobian loss
                "jacobian_increment": 0.1,  # added to the weight every ..
                "jacobian_increment_every": 0,  # .. so many steps; 0: never
                "jacobian_stop": 0,  # no Jacobian loss from this step on; 0: never stops
                "jacobian_through_equilibrium": False,  # differentiate it through the equilibrium as well
                "max_steps_jitter": 0,
                "pretrain_steps": 60_000,  # steps with the cell unrolled ..
                "pretrain_layers": 3,  # .. so many times, before the equilibrium
                "pretrain_jacobian_weight": 0.0,  # weight of the Jacobian loss there
            },
            "loss": {
                "class_weights": (
                    0.8373,
                    0.918,
                    0.866,
                    1.0345,
                    1.0166,
                    0.9969,
                    0.9754,
                    1.0489,
                    0.8786,
                    1.0023,
                    0.9539,
                    0.9843,
                    1.1116,
                    0.9037,
                    1.0865,
                    1.0955,
                    1.0865,
                    1.1529,
                    1.0507,
                ),  # one for each class; (): all 1
                "hard_threshold": 0.0,  # train on pixels whose right class is less likely than this; 0: on all
                "hard_pixels": 131_072,  # .. but on so many at least
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.01,
                "warmup_steps": 0,
                "schedule": "cosine",
                "clip_norm": 0.0,  # 0: none
                "weight_decay": 2e-4,
                "momentum": 0.9,  # sgd's
                "nesterov": False,  # sgd's
            },
            "train": {
                "steps": 500 * 247,  # epochs times batches
                "seed": 0,
                "log_every": 50,
                "eval_every": 2470,
                "checkpoint_every": 2470,
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
        raise ValueError(f"unknown variant {variant!r} of cityscapes; known: {', '.join(VARIANTS)}")
    config = _base()
    config.update_from_flattened_dict(VARIANTS[variant])
    return config.lock()
