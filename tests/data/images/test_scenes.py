"""Images with masks in every supported layout, from small files."""

import os

import numpy as np
import pytest
from PIL import Image

from deq_flax.data.images.scene_datasets import CAMVID, CITYSCAPES, SceneOptions, load_scenes
from deq_flax.data.images.scenes import IGNORE
from deq_flax.data.loading import EvalBatches
from deq_flax.errors import UserError


def options(**changed):
    return SceneOptions(**{"crop_size": (6, 8), "eval_size": (12, 16), "scales": (0.5, 1.0, 2.0)} | changed)


def write(root, image, labels, value=3, size=(12, 16)):
    """An image whose left half is `value`, and whose right half is 0, with its labels."""
    array = np.zeros(size, np.uint8)
    array[:, : size[1] // 2] = value
    for name, content in ((image, np.repeat(array[..., None], 3, axis=2)), (labels, array)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(path)


LAYOUTS = {
    "images and labels": ("{}/images/{}.png", "{}/labels/{}.png"),
    "split below": ("images/{}/{}.png", "masks/{}/{}.png"),
    "annot": ("{}/{}.png", "{}annot/{}.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_camvid_and_folders(tmp_path, layout):
    image, labels = LAYOUTS[layout]
    for split, value in (("train", 3), ("val", 5), ("test", 11)):
        for name in ("x", "y"):
            write(tmp_path, image.format(split, name), labels.format(split, name), value)
    data = load_scenes(options(name="camvid", path=str(tmp_path)))
    assert data.class_names == CAMVID and [len(data.split(s)) for s in ("train", "valid", "test")] == [2, 2, 2]
    for split, value in (("valid", 5), ("test", IGNORE)):
        batch = data.split(split).read(np.arange(2), None)
        assert batch["images"].shape == (2, 12, 16, 3)
        assert (batch["labels"][:, :, :8] == value).all() and (batch["labels"][:, :, 8:] == 0).all()
    with pytest.raises(UserError, match=r"holds the label 5, which is none of the 4 classes"):
        load_scenes(options(name="folders", path=str(tmp_path)), num_classes=4).valid.read(np.arange(2), None)
    ignoring = load_scenes(options(name="folders", path=str(tmp_path), ignored=(5,)), num_classes=4)
    assert (ignoring.valid.read(np.arange(2), None)["labels"][:, :, :8] == IGNORE).all()


def test_cityscapes_tree_and_list_agree(tmp_path):
    pairs = []
    for split, city in (("train", "aachen"), ("val", "ulm"), ("test", "bonn")):
        pair = (f"leftImg8bit/{split}/{city}/a_0_leftImg8bit.png", f"gtFine/{split}/{city}/a_0_gtFine_labelIds.png")
        write(tmp_path, *pair, value=26)
        pairs.append(pair)
    tree = load_scenes(options(name="cityscapes", path=str(tmp_path)))
    assert tree.test.scenes == tree.valid.scenes  # its own test split has no labels to score on
    labels = tree.valid.read(np.arange(1), None)["labels"]
    assert (labels[0, :, :8] == list(CITYSCAPES).index(26)).all() and (labels[0, :, 8:] == IGNORE).all()
    (tmp_path / "train.lst").write_text("\t".join(pairs[0]) + "\n")
    (tmp_path / "val.lst").write_text("\t".join(pairs[1]) + "\n")
    listed = load_scenes(options(name="cityscapes", path=str(tmp_path)))
    assert (listed.train.scenes, listed.valid.scenes) == (tree.train.scenes, tree.valid.scenes)
    (tmp_path / "val.lst").write_text("no/such.png no/labels.png\n")
    with pytest.raises(UserError, match=r"val\.lst line 1"):
        load_scenes(options(name="cityscapes", path=str(tmp_path)))


@pytest.fixture
def camvid(tmp_path):
    for split in ("train", "val"):
        for name in "abc":
            write(tmp_path, f"{split}/images/{name}.png", f"{split}/labels/{name}.png", 3)
    return tmp_path


def test_crops_keep_image_and_labels_together(camvid):
    train = load_scenes(options(name="camvid", path=str(camvid))).train
    for seed in range(20):
        batch = train.read(np.arange(3), np.random.default_rng(seed))
        images, labels = batch["images"][..., 0].astype(int), batch["labels"]
        known = labels != IGNORE
        assert known.any() and set(np.unique(labels)) <= {0, 3, IGNORE}
        assert not images[~known].any()
        assert (np.abs(images - labels)[known] <= 3).all()  # at the border of the halves, images blend
        assert (np.abs(images - labels)[known] == 0).mean() > 0.6


def test_small_images_are_filled_up_in_evaluation(camvid):
    data = load_scenes(options(name="camvid", path=str(camvid), eval_size=(16, 16)))
    batch = EvalBatches(data.valid, 2)[1]
    assert batch["mask"].tolist() == [1, 0]
    assert (batch["labels"][0, 12:] == IGNORE).all() and (batch["labels"][0, :12] != IGNORE).all()
    with pytest.raises(UserError, match=r"larger than data\.eval_size"):
        load_scenes(options(name="camvid", path=str(camvid), eval_size=(12, 15))).valid.read(np.arange(1), None)


def test_damaged_scenes_are_ignored_and_named(camvid, caplog):
    (camvid / "val/labels/a.png").write_bytes(b"\x89PNG no image")
    write(camvid, "other/x.png", "val/labels/b.png", size=(4, 4))
    data = load_scenes(options(name="camvid", path=str(camvid), max_damaged=2))
    batch = data.valid.read(np.arange(3), None)
    assert batch["mask"].tolist() == [0, 0, 1]
    assert (batch["labels"][:2] == IGNORE).all()
    assert len(data.damaged.names) == 2 and "val/labels/b.png" in caplog.text
    with pytest.raises(UserError, match="max_damaged 1"):
        load_scenes(options(name="camvid", path=str(camvid), max_damaged=1)).valid.read(np.arange(3), None)


def test_colored_masks_are_refused_by_name(camvid, caplog):
    write(camvid, "val/labels/a.png", "other/a.png")
    with pytest.raises(UserError, match="1 images are damaged"):
        load_scenes(options(name="camvid", path=str(camvid))).valid.read(np.arange(3), None)
    assert "not RGB" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"), [("cityscapes", "cityscapes-dataset.com"), ("camvid", "Cambridge"), ("kitti", "known:")]
)
def test_missing_data_is_an_error_that_names_its_source(tmp_path, name, message):
    for path in ("", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(UserError, match=message):
            load_scenes(options(name=name, path=path))


def test_folders_need_the_number_of_classes(camvid):
    with pytest.raises(UserError, match=r"model\.num_classes"):
        load_scenes(options(name="folders", path=str(camvid)))


def test_masks_in_other_formats_and_pipes_are_skipped(camvid):
    (camvid / "val/labels/a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\nshowpage\n")
    (camvid / "val/images/b.png").unlink()
    os.mkfifo(camvid / "val/images/b.png")
    data = load_scenes(options(name="camvid", path=str(camvid), max_damaged=2))
    for random in (None, np.random.default_rng(0)):
        assert data.valid.read(np.arange(3), random)["mask"].tolist() == [0, 0, 1]
    assert len(data.damaged.names) == 2
