"""Labeled images of every supported format, from small files."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from deq_flax.data.images.files import DamagedFiles
from deq_flax.data.images.labeled_datasets import ImageOptions, load_images
from deq_flax.errors import UserError

RANDOM = np.random.default_rng(0)


def options(**changed):
    return ImageOptions(**{"augment": "none", "pad": 0} | changed)


FILES = {"image_size": 8, "resize": 10}


def all_of(examples):
    return examples.read(np.arange(len(examples)), None)


def write_idx(path, array):
    content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path):
    arrays = {}
    for part, count, suffix in (("train", 12, ".gz"), ("t10k", 5, "")):
        arrays[part] = RANDOM.integers(0, 256, (count, 4, 4), np.uint8), RANDOM.integers(0, 10, count, np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", arrays[part][0])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", arrays[part][1])
    return tmp_path, arrays


def test_idx_files_gzipped_or_not(mnist):
    folder, arrays = mnist
    data = load_images(options(name="mnist", path=str(folder)))
    for examples, part in ((data.train, "train"), (data.test, "t10k"), (data.valid, "t10k")):
        batch = all_of(examples)
        np.testing.assert_array_equal(batch["images"][..., 0], arrays[part][0])
        np.testing.assert_array_equal(batch["labels"], arrays[part][1])
    assert len(load_images(options(name="fashion_mnist", path=str(folder))).class_names) == 10


def test_held_out_images_are_not_trained_on(mnist):
    folder, arrays = mnist
    data = load_images(options(name="mnist", path=str(folder), valid_examples=4))
    parts = [{image.tobytes() for image in all_of(each)["images"]} for each in (data.train, data.valid)]
    assert (len(parts[0]), len(parts[1])) == (8, 4) and not parts[0] & parts[1]
    assert parts[0] | parts[1] == {image.tobytes() for image in arrays["train"][0]}


@pytest.mark.parametrize("damage", ["cut", "magic", "gzip", "missing", "labels"])
def test_damaged_idx_files_give_one_clear_line(mnist, damage):
    folder, arrays = mnist
    images, labels = folder / "t10k-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte"
    if damage == "cut":
        images.write_bytes(images.read_bytes()[:-1])
    elif damage == "magic":
        images.write_bytes(b"\x00\x00\x09\x03" + images.read_bytes()[4:])
    elif damage == "gzip":
        file = folder / "train-images-idx3-ubyte.gz"
        file.write_bytes(file.read_bytes()[:40])
    elif damage == "missing":
        images.unlink()
    else:
        write_idx(labels, arrays["t10k"][1][:-1])
    with pytest.raises(UserError, match=r"get it again|get them again|set data\.path"):
        load_images(options(name="mnist", path=str(folder)))


def cifar(count):
    return RANDOM.integers(0, 256, (count, 32, 32, 3), np.uint8), RANDOM.integers(0, 10, count)


NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


@pytest.mark.parametrize("form", ["python", "python2", "binary"])
def test_cifar_batches(tmp_path, form):
    arrays = {name: cifar(3) for name in NAMES}
    folder = tmp_path / ("cifar-10-batches-bin" if form == "binary" else "cifar-10-batches-py")
    folder.mkdir()
    for name, (images, labels) in arrays.items():
        rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(3, -1)
        if form == "binary":
            (folder / f"{name}.bin").write_bytes(np.hstack([labels[:, None].astype(np.uint8), rows]).tobytes())
        else:
            batch = {b"data": rows, b"labels": labels.tolist(), b"batch_label": b"batch"}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2 if form == "python2" else 4))
    data = load_images(options(name="cifar10", path=str(tmp_path)))
    for examples, names in ((data.train, NAMES[:5]), (data.test, NAMES[5:])):
        batch = all_of(examples)
        np.testing.assert_array_equal(batch["images"], np.concatenate([arrays[name][0] for name in names]))
        np.testing.assert_array_equal(batch["labels"], np.concatenate([arrays[name][1] for name in names]))


class Malice:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Malice(tmp_path / "ran"), b"labels": [0]}))
    with pytest.raises(UserError, match=r"no batch of CIFAR-10 \(it refers to (_io|io).open\)"):
        load_images(options(name="cifar10", path=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [False, True])
def test_cifar_as_image_files(tmp_path, zipped):
    arrays = {}
    for split in ("train", "test"):
        for kind, label in (("airplane", 0), ("truck", 9)):
            image = cifar(1)[0][0]
            folder = tmp_path / "images" / split / kind
            folder.mkdir(parents=True)
            Image.fromarray(image).save(folder / "0.png")
            arrays[split, label] = image
    path = tmp_path / "images"
    if zipped:
        path = tmp_path / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted((tmp_path / "images").rglob("*.png")):
                archive.write(file, str(file.relative_to(tmp_path / "images")))
    data = load_images(options(name="cifar10", path=str(path)))
    for split in ("train", "test"):
        batch = all_of(getattr(data, split))
        assert batch["labels"].tolist() == [0, 9]
        np.testing.assert_array_equal(batch["images"], [arrays[split, 0], arrays[split, 9]])


@pytest.fixture
def folders(tmp_path):
    for split, kinds in (("train", "ba"), ("val", "ab")):
        for kind in kinds:
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(2):
                image = np.full((20, 12 + 4 * i, 3), 100 * (kind == "b") + 10 * i + 1, np.uint8)
                Image.fromarray(image).save(tmp_path / split / kind / f"{i}.png")
    return tmp_path


def test_image_folders(folders):
    data = load_images(options(name="folders", path=str(folders), **FILES))
    assert data.class_names == ("a", "b") and data.test is data.valid
    batch = all_of(data.valid)
    assert batch["labels"].tolist() == [0, 0, 1, 1] and batch["images"].shape == (4, 8, 8, 3)
    np.testing.assert_array_equal(batch["images"][:, 4, 4, 0], [1, 11, 101, 111])
    train = load_images(options(name="folders", path=str(folders), image_size=8, resize=10, augment="resized_crop_flip")).train
    random = train.read(np.arange(4), np.random.default_rng(0))
    expected = np.array([1, 11, 101, 111], np.uint8)[:, None, None, None]  # each image has one gray value
    np.testing.assert_array_equal(random["images"], np.broadcast_to(expected, (4, 8, 8, 3)))


def test_the_evaluated_part_is_the_center_after_resizing(tmp_path):
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / split / "a" / "0.png")
    image = all_of(load_images(options(name="folders", path=str(tmp_path), image_size=40, resize=50)).valid)["images"][0]
    np.testing.assert_allclose(image[20, :, 0], 60 + 2 * np.arange(40) + 0.5, atol=1)


def test_a_damaged_image_is_skipped_named_and_not_counted(folders, caplog):
    damaged = folders / "val" / "a" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (folders / "val" / "b" / "1.png").write_bytes(b"no image")
    data = load_images(options(name="folders", path=str(folders), image_size=8, resize=10, max_damaged=2))
    for _ in range(2):
        batch = all_of(data.valid)
        assert batch["mask"].tolist() == [0, 1, 1, 0] and not batch["images"][[0, 3]].any()
    assert [name.split("/")[-3:] for name in data.damaged.names] == [["val", "a", "0.png"], ["val", "b", "1.png"]]
    assert len(caplog.records) == 2 and str(damaged) in caplog.text
    with pytest.raises(UserError, match=r"2 images are damaged .*0\.png.*max_damaged 1"):
        all_of(load_images(options(name="folders", path=str(folders), image_size=8, resize=10, max_damaged=1)).valid)


def field(number, content):
    """A field of a protocol buffer message whose content is below 128 bytes, or a number."""
    return bytes([number << 3 | 2, len(content)]) + content


def test_array_records(tmp_path):
    writer = pytest.importorskip("array_record.python.array_record_module")
    (tmp_path / "label.labels.txt").write_text("cat\ndog\n")
    for shard, split, label in ((0, "train", 0), (1, "train", 1), (0, "validation", 1)):
        png = tmp_path / "x.png"
        Image.fromarray(np.full((10, 10, 3), 50 * label + 7, np.uint8)).save(png)
        image = field(1, b"image") + field(2, field(1, field(1, png.read_bytes())))
        number = field(1, b"label") + field(2, field(3, field(1, bytes([label]))))
        file = writer.ArrayRecordWriter(str(tmp_path / f"pets-{split}.array_record-0000{shard}-of-00002"), "group_size:1")
        file.write(field(1, field(1, image) + field(1, number)))
        file.close()
    data = load_images(options(name="folders", path=str(tmp_path), **FILES))
    assert data.class_names == ("cat", "dog")
    batch = all_of(data.train)
    assert batch["labels"].tolist() == [0, 1] and batch["images"][:, 0, 0, 0].tolist() == [7, 57]
    assert all_of(data.valid)["labels"].tolist() == [1]


def test_the_digits_need_no_files():
    data = load_images(options(name="digits"))
    assert data.train.shape == (8, 8, 1) and len(data.train) + len(data.test) == 1797
    assert all_of(data.test)["images"].max() == 255 and set(all_of(data.test)["labels"]) == set(range(10))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "MNIST database"),
        ("cifar10", "cifar-10-{python,binary}.tar.gz"),
        ("folders", "image-net.org"),
        ("pictures", "known: mnist"),
    ],
)
def test_missing_data_is_an_error_that_names_its_source(tmp_path, name, message):
    for path in ("", str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(UserError) as error:
            load_images(options(name=name, path=path))
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [{"augment": "resized_crop_flip"}, {"augment": "rotate"}, {"image_size": 8}, {"pad": -1}, {"valid_examples": 9999}],
)
def test_options_that_do_not_fit_the_data_are_refused(changed):
    with pytest.raises(UserError, match=r"data\."):
        load_images(options(name="digits", **changed))


def test_too_many_damaged_images_are_an_error():
    damaged = DamagedFiles(1)
    damaged.add("a", "cut")
    damaged.add("a", "cut")
    with pytest.raises(UserError, match="2 images are damaged"):
        damaged.add("b", "cut")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def png_of_zeros(side):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(side * (1 + side // 8)))) + chunk(b"IEND", b"")


def other_format(form):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(stream, form)
    return stream.getvalue()


HOSTILE = {
    "program": EPS,
    "tiff": other_format("TIFF"),
    "gif": other_format("GIF"),
    "large": png_of_zeros(12_000),
    "comment": b"P6 #" + b"a" * 100_000 + b"\n2 2 255\n" + bytes(12),
    "digits": b"P6 1" + b"0" * 4000 + b" 1 255\n",
    "text": b"P3 1200 1200 255\n" + b"0 " * (3 * 1200 * 1200),
}


def test_images_of_other_formats_and_bombs_are_skipped_and_start_nothing(folders, monkeypatch):
    """A PostScript file would make Pillow start Ghostscript, whatever its name is."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for name, content in HOSTILE.items():
        (folders / "val" / "b" / f"{name}.png").write_bytes(content)
    os.mkfifo(folders / "val" / "b" / "pipe.png")
    for name, target in (("zero", "/dev/zero"), ("loop", "loop.png"), ("gone", "none")):
        (folders / "val" / "b" / f"{name}.png").symlink_to(target)
    (folders / "val" / "b" / "line\nbreak.png").write_bytes(b"")
    data = load_images(options(name="folders", path=str(folders), image_size=8, resize=10, max_damaged=99))
    batch = all_of(data.valid)
    assert batch["mask"].sum() == 4 and len(data.damaged.names) == len(HOSTILE) + 5
    assert sorted(name.split("/")[-1] for name in data.damaged.names)[-1] == "zero.png"


def test_links_to_a_folder_that_is_being_walked_are_not_followed(folders):
    for name in ("x", "y"):
        (folders / "train" / "a" / name).symlink_to("..", target_is_directory=True)
    (folders / "train" / "c").symlink_to("b", target_is_directory=True)
    data = load_images(options(name="folders", path=str(folders), **FILES))
    assert len(data.train) == 6 and data.class_names == ("a", "b", "c")


@pytest.mark.parametrize("how", ["bzip2", "lzma", "encrypted", "unknown", "size"])
def test_members_of_a_zip_file_that_cannot_be_unpacked_are_skipped(folders, how):
    path = folders / "x.zip"
    methods = {"bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folders.rglob("*.png")):
            name = str(file.relative_to(folders))
            archive.write(file, name, methods.get(how) if name == "val/b/1.png" else None)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    changes = {"encrypted": (8, b"\x01"), "unknown": (10, b"\x63"), "size": (24, b"\xff\xff\xff\x7f")}
    if how in changes:
        place, content = changes[how]
        data[entry + place : entry + place + len(content)] = content
        path.write_bytes(data)
    images = load_images(options(name="folders", path=str(path), image_size=8, resize=10, max_damaged=1))
    assert all_of(images.valid)["mask"].tolist() == [1, 1, 1, 0] and len(images.damaged.names) == 1


def test_too_few_file_handles_are_not_the_fault_of_an_image(folders, monkeypatch):
    data = load_images(options(name="folders", path=str(folders), image_size=8, resize=10, max_damaged=9))

    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("deq_flax.data.images.files.read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*: Too many open files"):
        all_of(data.valid)


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ((1 << 31, 1 << 31, 4), b""),
        ((0x80000001, 0x80000000, 0x40000000), b""),
        ((1 << 16, 1 << 16, (1 << 32) - 1), bytes(16)),
        ((3, 4, 4), bytes(47)),
        ((3, 4, 4), bytes(49)),
    ],
)
def test_sizes_of_idx_files_do_not_wrap(mnist, shape, content):
    folder, _ = mnist
    head = bytes((0, 0, 8, 3)) + np.array(shape, ">u4").tobytes()
    for suffix, pack in (("", bytes), (".gz", gzip.compress)):
        (folder / "t10k-images-idx3-ubyte").unlink(missing_ok=True)
        (folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(head + content))
        with pytest.raises(UserError, match="get it again"):
            load_images(options(name="mnist", path=str(folder)))


def test_a_gzip_bomb_is_refused_unopened(mnist):
    folder, _ = mnist
    head = bytes((0, 0, 8, 3)) + np.array((1 << 20, 28, 28), ">u4").tobytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(1 << 20)))
    with pytest.raises(UserError, match=r"states an array of \(1048576, 28, 28\) in a file of"):
        load_images(options(name="mnist", path=str(folder)))


@pytest.mark.parametrize("what", ["key", "labels", "claim"])
def test_nested_pickles_in_place_of_cifar_are_refused(tmp_path, what):
    deep = b"K\x01" + b"\x85" * 50_000
    data = {
        "key": b"\x80\x02}" + deep + b"Ns.",
        "labels": b"\x80\x02}(C\x06labels" + deep + b"C\x04datacnumpy\nndarray\n)Ru.",
        "claim": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    }[what]
    for name in NAMES:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="no batch of CIFAR-10"):
        load_images(options(name="cifar10", path=str(tmp_path)))


def test_records_without_a_key_or_with_strange_labels_are_skipped(tmp_path):
    writer = pytest.importorskip("array_record.python.array_record_module")
    (tmp_path / "label.labels.txt").write_text("cat\ndog\n")
    image = field(1, b"image") + field(2, field(1, field(1, b"x")))
    labels = [b"\x02", b"\xff" * 9 + b"\x01", b"\xff" * 50 + b"\x01", b""]
    records = [field(1, field(1, field(2, field(3, field(1, b"\x01")))))]
    records += [
        field(1, field(1, image) + field(1, field(1, b"label") + field(2, field(3, field(1, label))))) for label in labels
    ]
    for split in ("train", "validation"):
        file = writer.ArrayRecordWriter(str(tmp_path / f"pets-{split}.array_record-00000-of-00001"), "group_size:1")
        for record in [*records, b"\x0a"]:
            file.write(record)
        file.close()
    data = load_images(options(name="folders", path=str(tmp_path), image_size=8, resize=10, max_damaged=9))
    assert not all_of(data.valid)["mask"].any() and len(data.damaged.names) == 6
    for content in (b"", b"\xff\xfe\n", b"a\n\nb\n"):
        (tmp_path / "label.labels.txt").write_bytes(content)
        with pytest.raises(UserError, match="get it again"):
            load_images(options(name="folders", path=str(tmp_path), **FILES))
