"""Images with masks by name: three splits of scenes and the names of the classes.

To add a data set: a loader function and a line in `SCENES`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from deq_flax.data.images.files import DamagedFiles, FileTree, is_image
from deq_flax.data.images.scenes import IGNORE, Scene, SceneExamples
from deq_flax.data.loading import ON_DISK, Splits, check_least, data_path, readable
from deq_flax.errors import UserError
from deq_flax.untrusted.files import shown

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light", 20: "traffic sign",
    21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
    32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""The scored classes, in order, by their labelIds."""
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
_MASK_FOLDERS = ("labels", "masks", "annotations")


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """Section `data` of a segmentation model's config."""

    name: str
    """Data set: {SCENES}. cityscapes and camvid are read from the published files; folders are any images with masks of class
    numbers."""
    path: str = ""
    """Folder or zip file of the data set."""
    batch_size: int = 16
    """Crops in a training step, over all devices and micro-batches."""
    eval_batch_size: int = 1
    """Images in an evaluation step, over all devices."""
    crop_size: tuple[int, int] = (512, 512)
    """Height and width of training crops."""
    scales: tuple[float, ...] = tuple(tenths / 10 for tenths in range(5, 22))
    """Factors by one of which, drawn at random, a training image is scaled."""
    ignored: tuple[int, ...] = ()
    """Labels that are not scored, besides 255; only with data.name folders."""
    eval_size: tuple[int, int] = (512, 512)
    """Height and width that smaller images are filled up to in evaluation."""
    eval_scales: tuple[float, ...] = (1.0,)
    """Sizes, relative to the image, at which it is evaluated; the probabilities are averaged."""
    eval_flip: bool = False
    """Evaluate the mirrored image too, and average the probabilities."""
    eval_window: tuple[int, int] = (0, 0)
    """Height and width of a window that slides over the image in evaluation; 0, 0: the whole image at once."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each color channel, subtracted from images scaled to 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each color channel, which images are divided by."""
    max_damaged: int = 0
    """Damaged images that are skipped before the run fails."""
    pictures: int = 4
    """Validation images shown with their predictions; 0: none."""

    def __post_init__(self):
        for name in ("crop_size", "scales", "ignored", "eval_size", "eval_scales", "eval_window", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_least(self, 1, "batch_size", "eval_batch_size")
        check_least(self, 0, "max_damaged", "pictures")
        if any(len(size) != 2 or min(size) < 1 for size in (self.crop_size, self.eval_size)):
            raise UserError(f"data.crop_size {self.crop_size} and eval_size {self.eval_size} are heights and widths: 1 or more")
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"data.scales must hold positive numbers, not {self.scales}")
        if self.ignored and self.name != "folders":
            raise UserError(f"data.ignored is for data.name folders: set it to () for {self.name}, which knows what to ignore")


@dataclass(frozen=True, kw_only=True)
class SceneData(Splits[SceneExamples]):
    """Images with masks. A data set without a labeled validation or test split has the other one in its place."""

    class_names: tuple[str, ...]
    damaged: DamagedFiles


def load_scenes(options: SceneOptions, num_classes: int = 0) -> SceneData:
    """Load the data set `options.name`. Any of them may also be given as lists of pairs.

    Args:
        options: section `data` of the config.
        num_classes: the number of classes of the model; used only for 'folders', whose files do not tell it.

    Raises:
        UserError: an unknown name, files that are missing, or an option that does not suit them.
    """
    if options.name not in SCENES:
        raise UserError(f"no scenes {options.name!r}; known: {', '.join(SCENES)}")
    return SCENES[options.name](options, num_classes)


def _load_cityscapes(options: SceneOptions, _: int) -> SceneData:
    published = (
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png; published as "
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip at cityscapes-dataset.com for those who sign up"
    )
    class_of = _class_of({label: number for number, label in enumerate(CITYSCAPES)}, void=range(max(CITYSCAPES) + 1))
    return _load(options, published, _cityscapes_pairs, class_of, tuple(CITYSCAPES.values()))


def _load_camvid(options: SceneOptions, _: int) -> SceneData:
    published = (
        "{train,val,test}/{images,labels}/* or {train,val,test}/* and {train,val,test}annot/*, 11 classes; published by the "
        "University of Cambridge, 'CamVid', and in the SegNet tutorial's repository"
    )
    class_of = _class_of({number: number for number in range(len(CAMVID))}, void=(len(CAMVID),))
    return _load(options, published, _adjacent_pairs, class_of, CAMVID)


def _load_folders(options: SceneOptions, num_classes: int) -> SceneData:
    published = (
        "{train,val[,test]}/{images,labels}/*, or {images,labels}/{train,val[,test]}/*, or of lists "
        "{train,val[,test]}.{lst,txt} of lines 'IMAGE LABELS'"
    )
    if not 1 <= num_classes <= IGNORE:
        raise UserError(f"model.num_classes must say how many classes the masks have (1 to {IGNORE}), not {num_classes}")
    void = {label for label in options.ignored if 0 <= label <= IGNORE}
    class_of = _class_of({number: number for number in range(num_classes) if number not in void}, void=void)
    return _load(options, published, _adjacent_pairs, class_of, tuple(map(str, range(num_classes))))


SCENES: dict[str, Callable[[SceneOptions, int], SceneData]] = {
    "cityscapes": _load_cityscapes,
    "camvid": _load_camvid,
    "folders": _load_folders,
}
"""Loaders by `data.name`: (options, number of classes of the model) -> data."""

Pairs = dict[str, list[Scene]]
"""The image and mask files of each split."""


def _load(
    options: SceneOptions,
    published: str,
    find_pairs: Callable[[Iterable[str]], Pairs],
    class_of: np.ndarray,
    class_names: tuple[str, ...],
) -> SceneData:
    """Find the pairs of files and build the data set; see `SceneExamples` for `class_of`."""
    wanted = f"set data.path to the folder of {published}"
    tree, damaged = FileTree(data_path(options.path, wanted)), DamagedFiles(options.max_damaged)
    names = tree.names()
    pairs = _pairs_in_lists(tree, names) or find_pairs(names)
    evaluated = pairs.get("valid") or pairs.get("test")
    if not pairs.get("train") or not evaluated:
        raise UserError(f"{tree.path} has no labeled images to train on, or none to evaluate on: {wanted}")

    def examples(scenes: list[Scene]) -> SceneExamples:
        return SceneExamples(
            scenes=scenes,
            tree=tree,
            class_of=class_of,
            damaged=damaged,
            crop_size=options.crop_size,
            eval_size=options.eval_size,
            scales=options.scales,
        )

    return SceneData(
        train=examples(pairs["train"]),
        valid=examples(evaluated),
        test=examples(pairs.get("test") or evaluated),
        class_names=class_names,
        damaged=damaged,
    )


def _class_of(classes: dict[int, int], void: Iterable[int]) -> np.ndarray:
    """(256,) class of each value in a mask: that in `classes`, else `IGNORE` if in `void`, else -1, which is an error."""
    table = np.full(256, -1)
    table[[*void, IGNORE]] = IGNORE
    table[list(classes)] = list(classes.values())
    return table


def _cityscapes_pairs(names: Iterable[str]) -> Pairs:
    """Match images and masks by city and frame. The masks of the test split are not published."""
    named = set(names)
    pairs: Pairs = {}
    for image in sorted(named):
        match = re.fullmatch(r"(.*?)leftImg8bit/(train|val)/([^/]+)/([^/]+)_leftImg8bit(\.\w+)", image)
        if match:
            labels = f"{match[1]}gtFine/{match[2]}/{match[3]}/{match[4]}_gtFine_labelIds.png"
            if labels in named:
                pairs.setdefault(ON_DISK[match[2]], []).append(Scene(image, labels))
    return pairs


def _adjacent_pairs(names: Iterable[str]) -> Pairs:
    """Match files of the same stem in folders of images and of masks, in any of the usual layouts."""
    images: dict[tuple[str, str], str] = {}
    masks: dict[tuple[str, str], str] = {}
    for name in filter(is_image, names):
        *folders, file = name.split("/")
        annotated = [folder for folder in folders if folder.endswith("annot") and folder.removesuffix("annot") in ON_DISK]
        splits = [ON_DISK[folder.removesuffix("annot")] for folder in folders if folder.removesuffix("annot") in ON_DISK]
        if splits:
            kind = masks if annotated or any(folder in _MASK_FOLDERS for folder in folders) else images
            kind[splits[0], file.rsplit(".", 1)[0]] = name
    pairs: Pairs = {}
    for key in sorted(images.keys() & masks.keys()):
        pairs.setdefault(key[0], []).append(Scene(images[key], masks[key]))
    return pairs


def _pairs_in_lists(tree: FileTree, names: Iterable[str]) -> Pairs:
    """Read the lists {train,val,test}.{lst,txt} at the top of `tree`; empty if there are none."""
    named = set(names)
    pairs: Pairs = {}
    for name, split in ON_DISK.items():
        file = next((f"{name}{suffix}" for suffix in (".lst", ".txt") if f"{name}{suffix}" in named), None)
        if file:
            pairs[split] = _read_list(tree, file, named)
    return pairs


def _read_list(tree: FileTree, file: str, named: set[str]) -> list[Scene]:
    """Read a list with one pair on each line."""
    scenes = []
    for number, line in enumerate(_read_text(tree, file).splitlines(), 1):
        parts = line.split()
        if len(parts) < 2:  # a blank line, or an image of a test split without labels
            continue
        if len(parts) != 2 or parts[0].lstrip("/") not in named or parts[1].lstrip("/") not in named:
            raise UserError(
                f"{tree.label(file)} line {number} must name an image and its labels below {tree.path}: {shown(line.strip())!r}"
            )
        scenes.append(Scene(parts[0].lstrip("/"), parts[1].lstrip("/")))
    return scenes


def _read_text(tree: FileTree, file: str) -> str:
    with readable(tree.label(file)):
        return tree.read(file).decode("utf-8")
