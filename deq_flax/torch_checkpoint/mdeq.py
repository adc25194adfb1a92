"""Tensor names of the multiscale DEQ, in both of the authors' code bases, which name its layer differently.

O, I, H, W: output and input channels, height and width of a kernel; the originals store (O, I, H, W), we (H, W, I, O).
"""

from collections.abc import Mapping
from typing import Any

from deq_flax.torch_checkpoint.mapping import Family, Row, sized

SAME_1 = (0,)
HWIO = (3, 2, 0, 1)
MAX_STEM = 6
"""Most convolutions of a stem that are looked for."""
MAX_BRANCHES = 4
"""Most branches that our model has."""


def conv2d(theirs: str, ours: str) -> list[Row]:
    """A torch.nn.Conv2d, with or without weight normalization."""
    return [
        Row(f"{theirs}.weight", f"{ours}/weight_HWIO", HWIO),
        Row(f"{theirs}.weight_g", f"{ours}/g_O", (0, None, None, None)),
        Row(f"{theirs}.weight_v", f"{ours}/v_HWIO", HWIO),
        Row(f"{theirs}.bias", f"{ours}/bias_O", SAME_1),
    ]


def norm(theirs: str, ours: str) -> list[Row]:
    """A torch.nn.GroupNorm or BatchNorm2d, with or without scale and bias."""
    leaves = {"weight": "scale_C", "bias": "bias_C", "running_mean": "mean_C", "running_var": "variance_C"}
    return [Row(f"{theirs}.{a}", f"{ours}/{b}", SAME_1) for a, b in leaves.items()]


def conv_norm(theirs: str, names: tuple[str, str], ours: str) -> list[Row]:
    """A convolution and a norm, called `names` within `theirs`, as one module of ours."""
    return conv2d(f"{theirs}{names[0]}", f"{ours}/conv") + norm(f"{theirs}{names[1]}", f"{ours}/norm")


def mdeq(stage: str) -> Family:
    """The family of the code base that calls the equilibrium layer `stage`."""
    block, fuse = f"{stage}.branches.{{i}}.blocks.0", f"{stage}.fuse_layers.{{i}}.{{j}}.net"
    rows = [
        *(row for i in range(MAX_STEM) for row in conv_norm("downsample.", (f"{3 * i}", f"{3 * i + 1}"), f"stem/layers/{i}")),
        *conv_norm("stage0.", ("0", "1"), "stem/mix"),
        *conv2d(f"{block}.conv1", "cell/blocks/{i}/conv1"),
        *norm(f"{block}.gn1", "cell/blocks/{i}/norm1"),
        *conv2d(f"{block}.conv2", "cell/blocks/{i}/conv2"),
        *norm(f"{block}.gn2", "cell/blocks/{i}/norm2"),
        *norm(f"{block}.gn3", "cell/blocks/{i}/norm3"),
        *conv_norm(f"{fuse}.", ("conv", "gnorm"), "cell/fuse/{i}/{j}"),
        *conv_norm(f"{fuse}.{{k}}.", ("conv", "gnorm"), "cell/fuse/{i}/{j}/layers/{k}"),
        *conv_norm(f"{stage}.post_fuse_layers.{{i}}.", ("conv", "gnorm"), "cell/post_fuse/{i}"),
        *conv_norm("incre_modules.{i}.0.", ("conv1", "bn1"), "head/branches/{i}/first"),
        *conv_norm("incre_modules.{i}.0.", ("conv2", "bn2"), "head/branches/{i}/second"),
        *conv_norm("incre_modules.{i}.0.", ("conv3", "bn3"), "head/branches/{i}/third"),
        *conv_norm("incre_modules.{i}.0.downsample.", ("0", "1"), "head/branches/{i}/shortcut"),
        *conv_norm("downsamp_modules.{i}.", ("0", "1"), "head/down/{i}"),
        *conv_norm("final_layer.", ("0", "1"), "head/final"),
        Row("classifier.weight", "head/classifier/weight_IO", (1, 0)),
        Row("classifier.bias", "head/classifier/bias_O", SAME_1),
        *conv_norm("last_layer.", ("0", "1"), "head/mix"),
        *conv2d("last_layer.3", "head/last"),
    ]
    counters = {"running_mean": "num_batches_tracked"}
    return Family(layer=f"{stage}.", rows=rows, counters=counters, infer=lambda shapes: _infer(stage, shapes))


def _infer(stage: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Options of an `MDEQ`; groups, dropout, momentum and how often a stem halves the resolution do not show in shapes."""
    shapes = sized(shapes)
    kernels = {name.removesuffix("_v"): shape for name, shape in shapes.items() if name.endswith((".weight", ".weight_v"))}
    blocks = []
    while all(f"{stage}.branches.{len(blocks)}.blocks.0.conv{k}.weight" in kernels for k in (1, 2)):
        name = f"{stage}.branches.{len(blocks)}.blocks.0"
        blocks.append((kernels[f"{name}.conv1.weight"], kernels[f"{name}.conv2.weight"]))
    if not 1 <= len(blocks) <= MAX_BRANCHES or any(len(shape) != 4 for pair in blocks for shape in pair):
        return {}
    channels = tuple(second[0] for _, second in blocks)
    held = {name.removesuffix(".weight_g") for name in shapes if name.endswith(".weight_g")}
    after, between = f"{stage}.post_fuse_layers.0.conv" in held, f"{stage}.fuse_layers.0.1.net.conv" in held
    options: dict[str, Any] = {
        "channels": channels,
        "expansion": blocks[0][0][0] // channels[0],
        "weight_norm": f"{stage}.branches.0.blocks.0.conv1" in held,
        "fuse_norm_affine": f"{stage}.post_fuse_layers.0.gnorm.weight" in shapes,
    }
    n_big = tuple(sum(shape[-1] == 5 for shape in pair) for pair in blocks)
    options["big_kernels"] = n_big if any(n_big) else ()
    if options["weight_norm"] and len(channels) > 1:
        options["fuse_weight_norm"] = "all" if between else "post" if after else "none"
    options["downsample"] = None if "stage0.0.weight" in shapes or len(channels) > 2 else 0
    if len(kernels.get("downsample.0.weight", ())) == 4:
        options["in_channels"] = kernels["downsample.0.weight"][1]
    return options | _infer_head(kernels, len(channels))


def _infer_head(kernels: Mapping[str, tuple[int, ...]], n_branches: int) -> dict[str, Any]:
    """Options of the head, of whichever kind the file has."""
    last = kernels.get("last_layer.3.weight", ())
    if len(last) == 4:
        return {"num_classes": last[0], "last_kernel": last[-1]}
    widths = [kernels.get(f"incre_modules.{i}.0.conv1.weight", ()) for i in range(n_branches)]
    classifier = kernels.get("classifier.weight", ())
    if any(len(shape) != 4 for shape in widths) or len(classifier) != 2:
        return {}
    head_channels = tuple(shape[0] for shape in widths)
    return {"num_classes": classifier[0], "head_channels": head_channels, "final_channels": classifier[1]}
