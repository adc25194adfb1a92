"""MNIST, or Fashion-MNIST: a small MDEQ of two branches.

    python -m deq_flax.main --config configs/mnist.py --workdir DIR --config.data.path=FOLDER
    python -m deq_flax.main --config configs/mnist.py --workdir DIR --config.data.name=fashion_mnist --config.data.path=FOLDER

| what | test accuracy |
|---|---|
| mnist, less than ten minutes on two CPU cores | published: none; measured: see README |
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config, locked."""
    return ConfigDict(
        {
            "task": "classification",
            "data": {
                "name": "mnist",
                "path": "data/mnist",  # the folder of the four idx files
                "batch_size": 128,
                "eval_batch_size": 250,
                "image_size": 0,  # of images in files, that they are cropped to; 0: those in memory stay as they are
                "resize": 0,  # of images in files: what the shorter side becomes before the central crop; 0: in memory
                "augment": "crop",  # none, crop, crop_flip; resized_crop_flip for images in files
                "pad": 2,  # pixels that a crop shifts by
                "mean": (0.1307,),
                "std": (0.3081,),
                "valid_examples": 5000,  # held out of the training images; 0: the test images validate
                "max_damaged": 0,  # damaged images that are skipped before giving up
                "pictures": 16,  # validation images to show with their predictions; 0: none
            },
            "model": {
                "num_classes": 10,
                "channels": (16, 32),
                "head": "classification",
                "head_channels": (8, 16),
                "final_channels": 128,
                "last_kernel": 1,  # segmentation's
                "in_channels": 1,
                "downsample": 2,
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
                "pretrain_steps": 200,  # steps with the cell unrolled ..
                "pretrain_layers": 3,  # .. so many times, before the equilibrium
                "pretrain_jacobian_weight": 0.0,  # weight of the Jacobian loss there
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 3e-3,
                "warmup_steps": 0,
                "schedule": "cosine",
                "clip_norm": 1.0,  # 0: none
                "weight_decay": 1e-5,
                "momentum": 0.0,  # sgd's
                "nesterov": False,  # sgd's
            },
            "train": {
                "steps": 1000,  # a bit more than two epochs
                "seed": 0,
                "log_every": 50,
                "eval_every": 500,
                "checkpoint_every": 500,
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
