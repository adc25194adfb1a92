"""Numbers computed with the authors' original MDEQ code, and our models with the weights of its files.

Floating arrays are float64 (gradients are stored rounded to float32). The originals are (batch, channels, height, width).
"""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_flax.models.mdeq import MDEQ, MDEQOptions
from deq_flax.torch_checkpoint import FAMILIES, family_of, open_tensors, slots
from tests.cases import others_slow
from tests.reference import FOLDER

FIXTURES = others_slow(
    [
        "mdeq_deq_cls2",
        "mdeq_deq_cls4",
        "mdeq_deq_seg3",
        "mdeq_deq_cls2_nownorm_bigk",
        "mdeq_tdeq_cls2",
        "mdeq_tdeq_cls4",
    ],
    ["mdeq_deq_cls2"],
)
"""Names of the fixtures, for `pytest.mark.parametrize`. Several of them, and three or four branches, take long to compile."""


def facts():
    """{'hparams': hyperparameters by fixture, 'full_size': {model: its parameter count and shapes by name}}."""
    return json.loads((FOLDER / "mdeq_models.json").read_text())


def source(name):
    return FOLDER / f"{name}.pth"


def options(name):
    """The keywords of `MDEQOptions` for a fixture."""
    h = facts()["hparams"][name]
    segmentation = "seg" in name
    sizes = dict(head="segmentation") if segmentation else dict(head_channels=h["head"], final_channels=h["final"])
    return sizes | dict(
        num_classes=h["num_classes"],
        channels=h["channels"],
        downsample=h["down"],
        expansion=h["expand"],
        groups=h["groups"],
        big_kernels=h.get("big", ()),
        fuse_norm_affine=h["post_gn_affine"],
        weight_norm=h["wnorm"],
        fuse_weight_norm="all" if "tdeq" in name else "post",
        norm_momentum=0.01 if segmentation else 0.1,
    )


def task(name):
    return "segmentation" if "seg" in name else "classification"


def build(name, *, wide=True, **changed):
    """The model of a fixture with its weights, as float64 if `wide`."""
    model = nnx.eval_shape(lambda: MDEQ(MDEQOptions(**options(name) | changed), rngs=nnx.Rngs(0)))
    with open_tensors(source(name)) as file:
        table = table_of(name, model)
        variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
        assert set(variables) == {slot.path for slot in table.values()}
        for theirs, slot in table.items():
            array = slot.row.to_ours(np.array(file.read(theirs)))
            variables[slot.path].set_value(jnp.asarray(array, jnp.float64 if wide else jnp.float32))
    return model


def table_of(name, model):
    """{original name: Slot} for the model of a fixture."""
    with open_tensors(source(name)) as file:
        family = FAMILIES[family_of("mdeq", file.tensors)]
    return {slot.theirs: slot for slot in slots(family, model)}


def ours(arrays, prefix, table):
    """{path of our parameter: array} from the entries under `prefix`, which have the original names."""
    named = {key.removeprefix(prefix): array.astype(np.float64) for key, array in arrays.items() if key.startswith(prefix)}
    return {table[theirs].path: table[theirs].row.to_ours(array) for theirs, array in named.items()}


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def images(arrays):
    return channels_last(arrays["x"])


def branches(arrays, prefix):
    """The tuple of branches under `prefix`/0, `prefix`/1, ..."""
    found = []
    while f"{prefix}/{len(found)}" in arrays:
        found.append(channels_last(arrays[f"{prefix}/{len(found)}"]))
    return tuple(found)
