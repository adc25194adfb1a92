"""Image tasks small enough to compile in seconds, on generated data."""

import numpy as np
from PIL import Image

DEQ = dict(
    solver="anderson", max_steps=4, backward_solver="anderson", backward_max_steps=4, jacobian_weight=0.5,
    jacobian_frequency=0.5, jacobian_increment_every=2, max_steps_jitter=1, pretrain_steps=2,
)  # fmt: skip
MODEL = dict(
    name="mdeq", num_classes=3, channels=(4,), head_channels=(2,), final_channels=8, expansion=1, groups=2, dropout=0.1,
)  # fmt: skip
COMMON = {
    "deq": DEQ,
    "optimizer": dict(name="sgd", learning_rate=0.05, clip_norm=1.0, momentum=0.9, nesterov=True),
    "train": dict(steps=6, log_every=1, eval_every=3, checkpoint_every=3, max_skipped=3),
    "mesh": dict(data=1),
}


def merged(config, overrides):
    sections = dict.fromkeys((*config, *overrides))
    return {name: config.get(name, {}) | overrides.get(name, {}) if name != "task" else config[name] for name in sections}


def classification(folder, **overrides):
    """A config of classification; overrides by section name: `train={'steps': 3}`."""
    data = dict(
        name="folders", path=str(folder), batch_size=4, eval_batch_size=4, image_size=8, resize=8, augment="resized_crop_flip",
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), pictures=2,
    )  # fmt: skip
    return merged({"task": "classification", "data": data, "model": MODEL} | COMMON, overrides)


def segmentation(folder, **overrides):
    """A config of segmentation; overrides by section name."""
    data = dict(
        name="folders", path=str(folder), batch_size=2, eval_batch_size=2, crop_size=(8, 8), scales=(0.8, 1.0, 1.25),
        ignored=(9,), eval_size=(8, 12), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), pictures=2,
    )  # fmt: skip
    model = MODEL | dict(head="segmentation", head_channels=(), final_channels=0)
    loss = dict(hard_pixels=8)
    return merged({"task": "segmentation", "data": data, "model": model, "loss": loss} | COMMON, overrides)


def write_labeled(folder, counts=(5, 3, 3)):
    """Write images of three classes of brightness; `counts`: images of a class in each split."""
    random = np.random.default_rng(0)
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for kind in range(3):
            (folder / split / f"class{kind}").mkdir(parents=True)
            for i in range(count):
                image = np.clip(40 + 80 * kind + random.integers(-20, 20, (9, 10, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / split / f"class{kind}" / f"{i}.png")
    return folder


def write_scenes(folder, counts=(4, 3, 2)):
    """Write images with vertical bands of three classes of brightness, and a row of pixels to be ignored."""
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
