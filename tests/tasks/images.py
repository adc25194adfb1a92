"""Image tasks small enough to compile in seconds, on data made here."""

import numpy as np
from PIL import Image

DEQ = dict(
    solver="anderson", tol=1e-3, max_steps=4, stop="relative", gradient="implicit", backward_solver="anderson",
    backward_tol=1e-3, backward_max_steps=4, phantom_steps=2, phantom_damping=0.5, jacobian_weight=0.5,
    jacobian_frequency=0.5, jacobian_increment=0.1, jacobian_increment_every=2, jacobian_stop=0,
    jacobian_through_equilibrium=False, max_steps_jitter=1, pretrain_steps=2, pretrain_layers=2, pretrain_jacobian_weight=0.0,
)  # fmt: skip
MODEL = dict(
    num_classes=3, channels=(4,), head="classification", head_channels=(2,), final_channels=8, last_kernel=1, in_channels=3,
    downsample=0, expansion=1, big_kernels=(), groups=2, fuse_norm_affine=False, weight_norm=True, fuse_weight_norm="post",
    dropout=0.1, norm_momentum=0.1, dtype="float32",
)  # fmt: skip
COMMON = {
    "deq": DEQ,
    "optimizer": dict(
        name="sgd", learning_rate=0.05, warmup_steps=0, schedule="cosine", clip_norm=1.0, weight_decay=0.0, momentum=0.9,
        nesterov=True,
    ),
    "train": dict(
        steps=6, seed=0, log_every=1, eval_every=3, checkpoint_every=3, accumulate=1, ema_decay=0.0, max_skipped=3
    ),
    "eval": dict(spectral_radius=False, max_steps_sweep=()),
    "mesh": dict(data=1, fsdp=1, tensor=1),
    "checkpoint": dict(keep_latest=2, keep_best=1, init_from=""),
}  # fmt: skip


def merged(config, overrides):
    return {name: part | overrides.get(name, {}) if isinstance(part, dict) else part for name, part in config.items()}


def classification(folder, **overrides):
    """A config; overrides by section name: `train={'steps': 3}`."""
    data = dict(
        name="folders", path=str(folder), batch_size=4, eval_batch_size=4, image_size=8, resize=8, augment="resized_crop_flip",
        pad=0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), valid_examples=0, max_damaged=0, pictures=2,
    )  # fmt: skip
    return merged({"task": "classification", "data": data, "model": MODEL} | COMMON, overrides)


def segmentation(folder, **overrides):
    """A config; overrides by section name."""
    data = dict(
        name="folders", path=str(folder), batch_size=2, eval_batch_size=2, crop_size=(8, 8), scales=(0.8, 1.0, 1.25),
        ignored=(9,), eval_size=(8, 12), eval_scales=(1.0,), eval_flip=False, eval_window=(0, 0), mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25), max_damaged=0, pictures=2,
    )  # fmt: skip
    model = MODEL | dict(head="segmentation", head_channels=(), final_channels=0)
    loss = dict(class_weights=(), hard_threshold=0.0, hard_pixels=8)
    return merged({"task": "segmentation", "data": data, "model": model, "loss": loss} | COMMON, overrides)


def write_labelled(folder, counts=(5, 3, 3)):
    """Images of three classes by brightness; `counts` a class in each split."""
    random = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for kind in range(3):
            (folder / split / f"class{kind}").mkdir(parents=True)
            for i in range(count):
                image = np.clip(40 + 80 * kind + random.integers(-20, 20, (9, 10, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / split / f"class{kind}" / f"{i}.png")
    return folder


def write_scenes(folder, counts=(4, 3, 2)):
    """Images of three classes by brightness in vertical bands, a row of each to be ignored."""
    random = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for name in ("images", "labels"):
            (folder / split / name).mkdir(parents=True)
        for i in range(count):
            labels = np.broadcast_to(np.sort(random.integers(0, 3, 12)), (8, 12)).astype(np.uint8)
            image = np.repeat((40 + 80 * labels)[..., None], 3, axis=2).astype(np.uint8)
            labels = np.concatenate([labels[:-1], np.full((1, 12), 9, np.uint8)])
            Image.fromarray(image).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(labels).save(folder / split / "labels" / f"{i}.png")
    return folder
