"""CamVid, 11 classes: a small MDEQ of three branches on street scenes of 480 x 360.

    python -m deq_flax.main --config configs/camvid.py --workdir DIR --config.data.path=FOLDER

| variant | what | test mIoU |
|---|---|---|
| base | 30,000 steps, for an accelerator | published: none for an MDEQ; not trained here |
| short | 240 steps at a quarter of the resolution, on two CPU cores | measured: see README |
"""

from ml_collections import ConfigDict

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


def _base() -> ConfigDict:
    return ConfigDict(
        {
            "task": "segmentation",
            "data": {
                "name": "camvid",
                "path": "data/camvid",  # the folder of {train,val,test}/{images,labels}
                "batch_size": 8,
                "eval_batch_size": 4,
                "crop_size": (360, 480),  # height and width of training crops
                "scales": tuple(tenths / 10 for tenths in range(5, 22)),  # a training image is enlarged by one
                "ignored": (),  # with data.name folders: labels that count for nothing
                "eval_size": (360, 480),  # height and width of whole images; smaller ones are filled up
                "eval_scales": (1.0,),  # sizes to look at an image in, the probabilities averaged
                "eval_flip": False,  # look at it mirrored too
                "eval_window": (0, 0),  # slide a window of this height and width over it; 0, 0: the whole at once
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "max_damaged": 0,  # damaged images that are skipped before giving up
                "pictures": 4,  # validation images to show with their predictions; 0: none
            },
            "model": {
                "num_classes": 11,
                "channels": (32, 64, 128),
                "head": "segmentation",
                "head_channels": (),  # classification's
                "final_channels": 0,  # classification's
                "last_kernel": 1,
                "in_channels": 3,
                "downsample": 2,
                "expansion": 5,
                "big_kernels": (),  # 5 for a branch, else 3; (): 3 for all
                "groups": 8,
                "fuse_norm_affine": False,
                "weight_norm": True,
                "fuse_weight_norm": "post",
                "dropout": 0.05,
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
                "pretrain_steps": 3000,  # steps with the cell unrolled ..
                "pretrain_layers": 3,  # .. so many times, before the equilibrium
                "pretrain_jacobian_weight": 0.0,  # weight of the Jacobian loss there
            },
            "loss": {
                "class_weights": (),  # one for each class; (): all 1
                "hard_threshold": 0.0,  # train on pixels whose right class is less likely than this; 0: on all
                "hard_pixels": 131_072,  # .. but on so many at least
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.02,
                "warmup_steps": 0,
                "schedule": "cosine",
                "clip_norm": 5.0,  # 0: none
                "weight_decay": 2e-4,
                "momentum": 0.9,  # sgd's
                "nesterov": False,  # sgd's
            },
            "train": {
                "steps": 30_000,
                "seed": 0,
                "log_every": 50,
                "eval_every": 1000,
                "checkpoint_every": 1000,
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


def get_config(variant: str = "base") -> ConfigDict:
    """The config of a variant, locked."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of camvid; known: {', '.join(VARIANTS)}")
    config = _base()
    config.update_from_flattened_dict(VARIANTS[variant])
    return config.lock()
