"""The tables: what the originals call the parameters of our models. A new kind of model is a new table.

O, I: output and input features of a map; theirs are (O, I), ours (I, O).
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from deq_flax.errors import UserError
from deq_flax.nn.attention import inverse_frequencies
from deq_flax.torch_checkpoint.mapping import Family, Row
from deq_flax.torch_checkpoint.mdeq import mdeq

SAME_1, SAME_2 = (0,), (0, 1)
TRANSPOSED = (1, 0)


def linear(theirs: str, ours: str) -> list[Row]:
    """A torch.nn.Linear, with or without weight normalisation."""
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


def _infer_language(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Options of a `DEQTransformer`. Memory, span, order of normalisation and dropout leave no trace in shapes."""
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
    if not tables or any(len(shape) != 2 for shape in tables):
        return options
    words, features = zip(*tables, strict=True)
    options["vocab_size"] = sum(words)
    n_clusters = 1 + shapes.get("crit.cluster_weight", (0,))[0]
    shared = len(tables) == 1 and n_clusters > 1
    options["cutoffs"] = None if shared else tuple(itertools.accumulate(words[:-1]))
    if len(tables) > 1:
        fitting = [div for div in range(2, features[0] + 2) if all(n == features[0] // div**i for i, n in enumerate(features))]
        options |= {"div_value": fitting[0]} if fitting else {}
    else:
        plain = shared or "word_emb.emb_projs.0.weight" not in shapes or options["d_embed"] != options.get("d_model")
        options["div_value"] = 1 if plain else 2
    return options


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return next(i for i in itertools.count() if pattern.format(i) not in shapes)


FAMILIES = {
    "language": Family(
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
        buffers={"pos_emb.inv_freq": lambda model: inverse_frequencies(model.d_model)},
        infer=_infer_language,
    ),
    "mdeq": mdeq("fullstage"),
    "mdeq_torchdeq": mdeq("full_stage"),
}

OF_TASK = {
    "language": ("language",),
    "classification": ("mdeq", "mdeq_torchdeq"),
    "segmentation": ("mdeq", "mdeq_torchdeq"),
}
"""Families by the name of the task, the one to write first."""


def task_of(names: Iterable[str]) -> str:
    """The task that tensors of these names are for; 'language' in doubt."""
    names = list(names)
    vision = any(name.startswith(FAMILIES[family].layer) for name in names for family in OF_TASK["classification"])
    if not vision:
        return "language"
    return "segmentation" if any(name.startswith("last_layer.") for name in names) else "classification"


def family_of(task: str, names: Iterable[str] = ()) -> str:
    """Which family of the task tensors of these names are of, the first in doubt. UserError: the task has none."""
    if task not in OF_TASK:
        raise UserError(f"weights of task {task!r} cannot be converted; known: {', '.join(OF_TASK)}")
    names = list(names)
    fitting = (family for family in OF_TASK[task] if any(name.startswith(FAMILIES[family].layer) for name in names))
    return next(fitting, OF_TASK[task][0])
