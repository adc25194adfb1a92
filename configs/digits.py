"""Handwritten digits that come with scikit-learn, 8 x 8 pixels: nothing is downloaded.

    python -m deq_flax.main --config configs/digits.py --workdir DIR

1,300 images to train on, 137 to choose the best checkpoint by, and 360 by other writers to test on.

| what | test accuracy |
|---|---|
| an MDEQ of two branches, about two minutes on two CPU cores | published: none; measured: see README |
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config, locked."""
    return ConfigDict(
        {
            "task": "classification",
            "data": {
                "name": "digits",
                "path": "",
                "batch_size": 64,
                "eval_batch_size": 137,
                "image_size": 0,  # of images in files, that they are cropped to; 0: those in memory stay as they are
                "resize": 0,  # of images in files: what the shorter side becomes before the central crop; 0: in memory
                "augment": "crop",  # none, crop, crop_flip; resized_crop_flip for images in files
                "pad": 1,  # pixels that a crop shifts by
                "mean": (0.3,),
                "std": (0.37,),
                "valid_examples": 137,  # held out of the training images; 0: the test images validate
                "max_damaged": 0,  # damaged images that are skipped before giving up
                "pictures": 16,  # validation images to show with their predictions; 0: none
            },
            "model": {
                "num_classes": 10,
                "channels": (16, 16),
                "head": "classification",
                "head_channels": (8, 16),
                "final_channels": 64,
                "last_kernel": 1,  # segmentation's
                "in_channels": 1,
                "downsample": 0,
                "expansion": 2,
                "big_kernels": (),  # 5 for a branch, else 3; (): 3 for all
                "groups": 4,
                "fuse_norm_affine": False,
                "weight_norm": True,
                "fuse_weight_norm": "post",
                "dropout": 0.1,
                "norm_momentum": 0.1,
                "dtype": "float32",  # of the convolutions; the solver's state is float32 always
            },
            "deq": {
                "solver": "broyden",
                "tol": 1e-3,
                "max_steps": 8,
                "stop": "relative",
                "memory": 0,  # iterates that Anderson combines, steps that Broyden keeps, both ways; 0: 6, and all
                "gradient": "implicit",  # or phantom, of a few damped steps; reversible; unroll, of all max_steps evaluations
                "backward_solver": "broyden",
                "backward_tol": 1e-3,
                "backward_max_steps": 8,
                "phantom_steps": 5,
                "phantom_damping": 0.5,
                "jacobian_weight": 0.0,
                "jacobian_frequency": 0.0,  # share of the steps that add the Jacobian loss
                "jacobian_increment": 0.1,  # added to the weight every ..
                "jacobian_increment_every": 0,  # .. so many steps; 0: never
                "jacobian_stop": 0,  # no Jacobian loss from this step on; 0: never stops
                "jacobian_through_equilibrium": False,  # differentiate it through the equilibrium as well
                "max_steps_jitter": 0,
                "pretrain_steps": 100,  # steps with the cell unrolled ..
                "pretrain_layers": 3,  # .. so many times, before the equilibrium
                "pretrain_jacobian_weight": 0.0,  # weight of the Jacobian loss there
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 4e-3,
                "warmup_steps": 0,
                "schedule": "cosine",
                "clip_norm": 1.0,  # 0: none
                "weight_decay": 1e-5,
                "momentum": 0.0,  # sgd's
                "nesterov": False,  # sgd's
            },
            "train": {
                "steps": 260,  # 13 epochs
                "seed": 0,
                "log_every": 20,
                "eval_every": 130,
                "checkpoint_every": 130,
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
    ).lock()
