"""Laws of the image configs: they hold the published values, and their models can be built."""

import math

import jax
import pytest
from flax import nnx

from deq_flax.config import phases_of, resolve
from deq_flax.models import abstract_model
from tests.cases import others_slow
from tests.test_configs import load, repeated

IMAGES = {name: load(name) for name in ("digits", "mnist", "cifar10", "imagenet", "camvid", "cityscapes")}
VARIANTS = [(name, variant) for name, module in IMAGES.items() for variant in getattr(module, "VARIANTS", {None: {}})]
QUICK = [next(case for case in VARIANTS if case[0] == name) for name in IMAGES]


def get(name, variant):
    config = IMAGES[name].get_config() if variant is None else IMAGES[name].get_config(variant)
    return resolve(config.to_dict())


@pytest.mark.parametrize(("name", "variant"), others_slow(VARIANTS, QUICK))
def test_every_model_can_be_built(name, variant):
    config = get(name, variant)
    abstract_model(config.model)
    phases = phases_of(config)
    assert phases.evaluation.solver.max_steps == config.deq.max_steps
    assert config.deq.pretrain_steps < config.train.steps
    assert config.optimizer.schedule == "cosine" and config.optimizer.warmup_steps == 0


@pytest.mark.parametrize("name", IMAGES)
def test_a_config_file_repeats_no_default(name):
    assert repeated(IMAGES[name]) == []


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "camvid", "cityscapes"])
def test_an_unknown_variant_names_the_known(name):
    with pytest.raises(ValueError, match="known: "):
        IMAGES[name].get_config("tini")


LONG = 100 * 10_009
CHANNELS = {"small": (32, 64, 128, 256), "large": (80, 160, 320, 640), "xl": (88, 176, 352, 704)}
# channels, head, final, batch, steps, layers, pretraining, solver, forward, backward, stop, dropout, rate, weight decay
PUBLISHED = {
    ("cifar10", "tiny"): (
        (24, 24), (8, 16), 200, 64, 50 * 781, 10, 3_000, "broyden", 18, 20, "relative", 0.25, 1e-3, 2.5e-6,
    ),
    ("cifar10", "large"): (
        CHANNELS["small"], (14, 28, 56, 112), 1680, 128, 220 * 390, 10, 20_000, "broyden", 18, 20, "relative", 0.3, 1e-3, 0.0,
    ),
    ("cifar10", "large_reg"): (
        CHANNELS["small"], (14, 28, 56, 112), 1680, 192, 220 * 260, 8, 16_000, "broyden", 8, 7, "relative", 0.22, 1e-3, 0.0,
    ),
    ("cifar10", "phantom"): (
        CHANNELS["small"], (14, 28, 56, 112), 1680, 128, 220 * 390, None, 0, "broyden", 18, None, "relative", 0.0, 0.1, 1e-4,
    ),
    ("imagenet", "small"): (
        CHANNELS["small"], (24, 48, 96, 192), 2048, 128, LONG, 5, 510_000, "broyden", 26, 27, "absolute", 0.0, 0.05, 5e-5,
    ),
    ("imagenet", "small_reg"): (
        CHANNELS["small"], (28, 56, 112, 224), 2048, 128, LONG, 5, 510_000, "broyden", 14, 14, "absolute", 0.02, 0.04, 2e-5,
    ),
    ("imagenet", "phantom"): (
        CHANNELS["small"], (24, 48, 96, 192), 2048, 128, LONG, None, 0, "picard", 26, None, "absolute", 0.0, 0.05, 5e-5,
    ),
    ("imagenet", "large"): (
        CHANNELS["large"], (32, 64, 128, 256), 2048, 128, LONG, 4, 510_000, "broyden", 26, 27, "absolute", 0.0, 0.05, 1e-4,
    ),
    ("imagenet", "large_reg"): (
        CHANNELS["large"], (32, 64, 128, 256), 2048, 128, LONG, 4, 510_000, "broyden", 14, 14, "absolute", 0.0, 0.05, 1e-4,
    ),
    ("imagenet", "xl"): (
        CHANNELS["xl"], (32, 64, 128, 256), 2048, 128, LONG, 4, 510_000, "broyden", 26, 27, "absolute", 0.0, 0.05, 1e-4,
    ),
    ("cityscapes", "small"): (
        CHANNELS["small"], (), 0, 12, 500 * 247, 3, 60_000, "broyden", 27, 30, "absolute", 0.05, 0.01, 2e-4,
    ),
    ("cityscapes", "large"): (
        CHANNELS["large"], (), 0, 12, 500 * 247, 3, 60_000, "broyden", 27, 30, "absolute", 0.03, 0.01, 3e-4,
    ),
    ("cityscapes", "xl"): (
        CHANNELS["xl"], (), 0, 8, 500 * 371, 3, 40_000, "broyden", 27, 30, "absolute", 0.04, 0.01, 3e-4,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_the_published_recipes(name, variant):
    c = get(name, variant)
    phantom = variant == "phantom"
    model = (c.model.channels, c.model.head_channels, c.model.final_channels, c.data.batch_size, c.train.steps)
    pretraining = (None if phantom else c.deq.pretrain_layers, c.deq.pretrain_steps)
    solver = (c.deq.solver, c.deq.max_steps, None if phantom else c.deq.backward_max_steps, c.deq.stop)
    last = (c.model.dropout, c.optimizer.learning_rate, c.optimizer.weight_decay)
    assert (*model, *pretraining, *solver, *last) == PUBLISHED[name, variant]
    assert c.deq.gradient == ("phantom" if phantom else "implicit")
    assert c.deq.gradient_options == ({"steps": 5, "relaxation": 0.7 if name == "cifar10" else 0.5} if phantom else {})
    assert (c.model.groups, c.model.weight_norm, c.model.big_kernels) == (8, True, ())
    assert c.model.expansion == (6 if variant == "xl" else 5)
    assert c.model.downsample == (0 if name == "cifar10" else 2)
    on = name == "cityscapes" or (name == "imagenet" and not variant.endswith("_reg")) or phantom
    assert c.model.fuse_norm_affine == on
    sgd = name != "cifar10" or phantom
    assert (c.optimizer.name, c.optimizer.momentum) == (("sgd", 0.9) if sgd else ("adam", 0.0))
    assert c.optimizer.nesterov == (name == "imagenet")


def test_the_published_jacobian_losses():
    def jacobian(name, variant):
        d = get(name, variant).deq
        return (
            d.jacobian_weight,
            d.jacobian_frequency,
            d.jacobian_increment_every,
            d.jacobian_stop,
            d.pretrain_jacobian_weight,
            d.max_steps_jitter,
        )

    assert jacobian("cifar10", "large_reg") == (0.4, 0.02, 0, 90 * 260, 0.0, 2)
    assert jacobian("imagenet", "small_reg") == (2.5, 0.08, 50_000, 0, 0.03, 2)
    assert jacobian("imagenet", "large_reg") == (3.0, 0.08, 50_000, 0, 0.0, 2)
    for name, variant in PUBLISHED:
        if not variant.endswith("_reg"):
            assert jacobian(name, variant) == (0.0, 0.0, 0, 0, 0.0, 0)


def test_the_published_augmentation():
    cifar, tiny, imagenet, city = (
        get(n, v).data for n, v in (("cifar10", "large"), ("cifar10", "tiny"), ("imagenet", "xl"), ("cityscapes", "large"))
    )
    assert (cifar.augment, cifar.pad, cifar.mean, cifar.std) == (
        "crop_flip",
        4,
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
    )
    assert tiny.augment == "none"
    assert (imagenet.augment, imagenet.image_size, imagenet.resize) == ("resized_crop_flip", 224, 256)
    assert (city.crop_size, city.eval_size, city.scales[0], city.scales[-1], len(city.scales)) == (
        (512, 1024),
        (1024, 2048),
        0.5,
        2.1,
        17,
    )
    assert get("cityscapes", "xl").data.crop_size == (768, 1024)
    assert len(get("cityscapes", "large").loss.class_weights) == 19


@pytest.mark.slow
def test_a_segmentation_model_has_the_body_of_the_classifier_of_its_variant():
    """All but the head has the same names and shapes, so that `checkpoint.init_from` can load it."""
    for variant in ("small", "large", "xl"):
        bodies = []
        for name in ("imagenet", "cityscapes"):
            state = nnx.to_pure_dict(nnx.state(abstract_model(get(name, variant).model), nnx.Param))
            del state["head"]
            bodies.append(jax.tree.map(lambda x: x.shape, state))
        assert bodies[0] == bodies[1]
        assert sum(map(math.prod, jax.tree.leaves(bodies[0], is_leaf=lambda x: isinstance(x, tuple)))) > 1e6
