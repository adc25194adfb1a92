"""Tensor names of the original models. A new kind of model is a new entry of FAMILIES and FAMILIES_OF.

O, I: output and input features of a linear map; the originals store (O, I), we (I, O).
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from deq_flax.errors import UserError
from deq_flax.nn.attention import inverse_frequencies
from deq_flax.torch_checkpoint.mapping import Family, Row, sized
from deq_flax.torch_checkpoint.mdeq import mdeq

SAME_1, SAME_2 = (0,), (0, 1)
TRANSPOSED = (1, 0)
MAX_CLUSTERS = 64
"""Most clusters of words that are looked for."""


def linear(theirs: str, ours: str) -> list[Row]:
    """A torch.nn.Linear, with or without weight normalization."""
    return [
        Row(f"{theirs}.weight", f"{ours}/weight_IO", TRANSPOSED),
        Row(f"{theirs}.weight_g", f"{ours}/g_O", (0, None)),
        Row(f"{theirs}.weight_v", f"{ours}/v_IO", TRANSPOSED),
        Row(f"{theirs}.bias", f"{ours}/bias_O", SAME_1),
    ]


def conv1d(theirs: str, ours: str) -> list[Row]:
    """A torch.nn.Conv1d of kernel size 1, which is a linear map."""
    return [
        Row(f"{theirs}.weight", f"{ours}/weight_IO", (1, 0, None)),
        Row(f"{theirs}.weight_g", f"{ours}/g_O", (0, None, None)),
        Row(f"{theirs}.weight_v", f"{ours}/v_IO", (1, 0, None)),
        Row(f"{theirs}.bias", f"{ours}/bias_O", SAME_1),
    ]


def _infer_transformer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Options of a `DEQTransformer`; memory, attention span, order of normalization and dropout do not show in shapes."""
    shapes = sized(shapes)
    options: dict[str, Any] = {"weight_norm": any(name.endswith("weight_g") for name in shapes)}

    def read(option: str, name: str, axis: int) -> None:
        if len(shapes.get(name, ())) > axis:
            options[option] = shapes[name][axis]

    read("d_model", "inject_conv.weight", 1)
    read("n_head", "func.dec_attn.r_w_bias", 0)
    read("d_head", "func.dec_attn.r_w_bias", 1)
    read("d_inner", "func.pos_ff.ff1_net.bias", 0)
    read("d_embed", "word_emb.emb_layers.0.weight", 1)
    tables = [shapes.get(f"word_emb.emb_layers.{i}.weight", ()) for i in range(_count(shapes, "word_emb.emb_layers.{}.weight"))]
    if not 1 <= len(tables) <= MAX_CLUSTERS or any(len(shape) != 2 for shape in tables):
        return options
    rows, features = zip(*tables, strict=True)
    options["vocab_size"] = sum(rows)
    n_clusters = 1 + (shapes.get("crit.cluster_weight") or (0,))[0]
    shared = len(tables) == 1 and n_clusters > 1
    options["cutoffs"] = None if shared else tuple(itertools.accumulate(rows[:-1]))
    if len(tables) > 1:
        # All values that divide the first cluster's features to those of the second.
        possible = range(max(features[0] // (features[1] + 1) + 1, 2), features[0] // features[1] + 1)
        fitting = (div for div in possible if all(n == features[0] // div**i for i, n in enumerate(features)))
        div_value = next(fitting, None)
        options |= {} if div_value is None else {"div_value": div_value}
    else:
        plain = shared or "word_emb.emb_projs.0.weight" not in shapes or options["d_embed"] != options.get("d_model")
        options["div_value"] = 1 if plain else 2
    return options


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return next(i for i in itertools.count() if pattern.format(i) not in shapes)


FAMILIES: dict[str, Family] = {
    "deq_transformer": Family(
        layer="func.",
        rows=[
            Row("word_emb.emb_layers.{i}.weight", "embedding/tables_NE/{i}", SAME_2),
            Row("word_emb.emb_projs.{i}.weight", "embedding/projections_ED/{i}", TRANSPOSED),
            *conv1d("inject_conv", "injection"),
            Row("func.dec_attn.r_w_bias", "cell/content_bias_HE", SAME_2),
            Row("func.dec_attn.r_r_bias", "cell/position_bias_HE", SAME_2),
            *conv1d("func.dec_attn.qkv_net", "cell/qkv"),
            *conv1d("func.dec_attn.r_net", "cell/relative"),
            *conv1d("func.dec_attn.o_net", "cell/out"),
            *linear("func.pos_ff.ff1_net", "cell/inner"),
            *linear("func.pos_ff.ff2_net", "cell/outer"),
            Row("crit.cluster_weight", "softmax/clusters_EC", TRANSPOSED),
            Row("crit.cluster_bias", "softmax/cluster_biases_C", SAME_1),
            Row("crit.out_layers.{i}.weight", "softmax/tables_NE/{i}", SAME_2),
            Row("crit.out_layers.{i}.bias", "softmax/biases_N/{i}", SAME_1),
            Row("crit.out_projs.{i}.weight", "softmax/projections_ED/{i}", TRANSPOSED),
        ],
        buffers={"pos_emb.inv_freq": lambda model: inverse_frequencies(model.options.d_model)},
        infer=_infer_transformer,
    ),
    "mdeq": mdeq("fullstage"),
    "mdeq_torchdeq": mdeq("full_stage"),
}

FAMILIES_OF: dict[str, tuple[str, ...]] = {"deq_transformer": ("deq_transformer",), "mdeq": ("mdeq", "mdeq_torchdeq")}
"""Families by the name of our model (config key `model.name`); files are written in the first by default."""

_FORMER_NAMES = {"language": "deq_transformer"}
"""Names of families in checkpoints that earlier versions converted."""


def model_of(names: Iterable[str]) -> str:
    """The name of our model for tensors of these names; 'deq_transformer' if they fit none."""
    names = list(names)
    fitting = (model for model, families in FAMILIES_OF.items() if any(_holds_layer(family, names) for family in families))
    return next(fitting, "deq_transformer")


def head_of(names: Iterable[str]) -> str | None:
    """'classification' or 'segmentation' for tensors of a multiscale DEQ, None for those of another model."""
    names = list(names)
    if model_of(names) != "mdeq":
        return None
    return "segmentation" if any(name.startswith("last_layer.") for name in names) else "classification"


def family_of(model: str, names: Iterable[str] = ()) -> str:
    """The family of our `model` that tensors of these names belong to, the model's first family if unclear.

    Raises:
      UserError: weights of this model cannot be converted.
    """
    if model not in FAMILIES_OF:
        raise UserError(f"weights of model {model!r} cannot be converted; known: {', '.join(FAMILIES_OF)}")
    names = list(names)
    return next((family for family in FAMILIES_OF[model] if _holds_layer(family, names)), FAMILIES_OF[model][0])


def family_name(stored: str) -> str:
    """The key in FAMILIES of a family that a checkpoint names, possibly by its name in an earlier version."""
    return _FORMER_NAMES.get(stored, stored)


def _holds_layer(family: str, names: Iterable[str]) -> bool:
    return any(name.startswith(FAMILIES[family].layer) for name in names)
