"""Images with masks by name: each data set becomes three splits of scenes and the names of its classes."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deq_flax.data.images.files import Damaged, FileTree, is_image
from deq_flax.data.images.scenes import IGNORE, Scene, SceneExamples
from deq_flax.data.splits import ON_DISK, Splits
from deq_flax.errors import UserError

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""The classes that are scored, in order, by their labelIds."""
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")

_PUBLISHED = {
    "cityscapes": "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png; published "
    "as leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip at cityscapes-dataset.com for those who sign up",
    "camvid": "{train,val,test}/{images,labels}/* or {train,val,test}/* and {train,val,test}annot/*, 11 classes; published by "
    "the University of Cambridge, 'CamVid', and in the SegNet tutorial's repository",
    "folders": "{train,val[,test]}/{images,labels}/*, or {images,labels}/{train,val[,test]}/*, or of lists "
    "{train,val[,test]}.{lst,txt} of lines 'IMAGE LABELS'",
}
_MASK_FOLDERS = ("labels", "masks", "annotations")


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """How scenes are read: what the section `data` of a config says of it."""

    crop_size: tuple[int, int]
    """Height and width of training crops."""
    eval_size: tuple[int, int]
    """Height and width that smaller images are filled up to in evaluation."""
    scales: tuple[float, ...]
    """Of which a training image is scaled by one, at random."""
    ignored: tuple[int, ...]
    """With 'folders': labels that count for nothing, besides 255."""
    max_damaged: int


@dataclass(frozen=True, kw_only=True)
class SceneData(Splits[SceneExamples]):
    """Where there is no 'test' with labels, 'valid' stands for it."""

    class_names: tuple[str, ...]
    damaged: Damaged


def load_scenes(name: str, path: str, options: SceneOptions, *, num_classes: int = 0) -> SceneData:
    """The data set `name`.

    Args:
        name: 'cityscapes' and 'camvid' read the published trees; 'folders' any images with masks of class numbers beside them.
            All three also read lists of pairs.
        path: the folder, or a zip file of it.
        options: see `SceneOptions`.
        num_classes: with 'folders', how many classes there are; the others know.

    Raises:
        UserError: an unknown name, files that are missing, or an option that does not suit them.
    """
    if name not in _PUBLISHED:
        raise UserError(f"no scenes {name!r}; known: {', '.join(_PUBLISHED)}")
    wanted = f"set data.path to the folder of {_PUBLISHED[name]}"
    if not path:
        raise UserError(f"data.path is not set: {wanted}")
    place = Path(os.path.expanduser(path))
    if not place.exists():
        raise UserError(f"data.path {place} does not exist: {wanted}")
    classes, class_names = _classes(name, options, num_classes)
    tree, damaged = FileTree(place), Damaged(options.max_damaged)
    names = tree.names()
    scenes = _from_lists(tree, names) or (_cityscapes(names) if name == "cityscapes" else _beside(names))
    if not scenes.get("train") or not (scenes.get("valid") or scenes.get("test")):
        raise UserError(f"{place} has no labelled images to train on, or none to evaluate on: {wanted}")
    scenes = {"valid": scenes.get("test"), "test": scenes.get("valid")} | {
        split: pairs for split, pairs in scenes.items() if pairs
    }
    examples = {
        split: SceneExamples(
            scenes=pairs or (),
            tree=tree,
            classes=classes,
            damaged=damaged,
            crop_size=options.crop_size,
            eval_size=options.eval_size,
            scales=options.scales,
        )
        for split, pairs in scenes.items()
    }
    return SceneData(**examples, class_names=class_names, damaged=damaged)


def _classes(name: str, options: SceneOptions, num_classes: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of each value in the files, and the names of the classes."""
    table = np.full(256, -1)
    table[IGNORE] = IGNORE
    if options.ignored and name != "folders":
        raise UserError(f"data.ignored is for data.name folders: set it to () for {name}, which knows what to ignore")
    if name == "cityscapes":
        table[: max(CITYSCAPES) + 1] = IGNORE
        table[list(CITYSCAPES)] = np.arange(len(CITYSCAPES))
        return table, tuple(CITYSCAPES.values())
    if name == "camvid":
        table[len(CAMVID)] = IGNORE
        table[: len(CAMVID)] = np.arange(len(CAMVID))
        return table, CAMVID
    if not 1 <= num_classes <= IGNORE:
        raise UserError(f"model.num_classes must say how many classes the masks have (1 to {IGNORE}), not {num_classes}")
    table[:num_classes] = np.arange(num_classes)
    table[[label for label in options.ignored if 0 <= label < 256]] = IGNORE
    return table, tuple(str(i) for i in range(num_classes))


def _cityscapes(names: Iterable[str]) -> dict[str, list[Scene]]:
    """Pairs by city and frame; the test split's labels, all void, are not published to be scored on."""
    named = set(names)
    scenes: dict[str, list[Scene]] = {}
    for image in sorted(named):
        match = re.fullmatch(r"(.*?)leftImg8bit/(train|val)/([^/]+)/([^/]+)_leftImg8bit(\.\w+)", image)
        if match:
            labels = f"{match[1]}gtFine/{match[2]}/{match[3]}/{match[4]}_gtFine_labelIds.png"
            if labels in named:
                scenes.setdefault("valid" if match[2] == "val" else "train", []).append(Scene(image, labels))
    return scenes


def _beside(names: Iterable[str]) -> dict[str, list[Scene]]:
    """Pairs of the same stem in folders of images and of labels, in any of the usual orders."""
    images: dict[tuple[str, str], str] = {}
    masks: dict[tuple[str, str], str] = {}
    for name in filter(is_image, names):
        *folders, file = name.split("/")
        annotated = [folder for folder in folders if folder.endswith("annot") and folder.removesuffix("annot") in ON_DISK]
        splits = [ON_DISK[folder.removesuffix("annot")] for folder in folders if folder.removesuffix("annot") in ON_DISK]
        if splits:
            kind = masks if annotated or any(folder in _MASK_FOLDERS for folder in folders) else images
            kind[splits[0], file.rsplit(".", 1)[0]] = name
    scenes: dict[str, list[Scene]] = {}
    for key in sorted(images.keys() & masks.keys()):
        scenes.setdefault(key[0], []).append(Scene(images[key], masks[key]))
    return scenes


def _from_lists(tree: FileTree, names: Iterable[str]) -> dict[str, list[Scene]]:
    """Pairs in lists at the top, one pair a line; empty if there are no lists."""
    named = set(names)
    scenes: dict[str, list[Scene]] = {}
    for name, split in ON_DISK.items():
        file = next((f"{name}{suffix}" for suffix in (".lst", ".txt") if f"{name}{suffix}" in named), None)
        if file:
            scenes[split] = _pairs(tree, file, named)
    return scenes


def _pairs(tree: FileTree, file: str, named: set[str]) -> list[Scene]:
    pairs = []
    for number, line in enumerate(_text(tree, file).splitlines(), 1):
        parts = line.split()
        if not parts or len(parts) == 1:  # a test split's images without labels
            continue
        if len(parts) != 2 or parts[0].lstrip("/") not in named or parts[1].lstrip("/") not in named:
            raise UserError(
                f"{tree.label(file)} line {number} must name an image and its labels below {tree.path}: {line.strip()!r}"
            )
        pairs.append(Scene(parts[0].lstrip("/"), parts[1].lstrip("/")))
    return pairs


def _text(tree: FileTree, file: str) -> str:
    try:
        return tree.read(file).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {tree.label(file)}: {error}") from error
