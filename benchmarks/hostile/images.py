"""Images in place of those of a data set: other formats, bombs, damage, devices, and archives that cannot be unpacked.

Each stands among whole images, where it must be skipped, counted and named, or read.
"""

import functools
import io
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.hostile import Case, SilentlyWrongError, damaged
from benchmarks.hostile.archives import METHODS, patched

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
GOOD = 3


def picture(form: str, size: tuple[int, int] = (20, 20)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def write_tree(folder: Path) -> Path:
    """A data set of image folders, with GOOD whole images in the validation split."""
    for split, count in (("train", 2), ("val", GOOD)):
        (folder / split / "a").mkdir(parents=True)
        for i in range(count):
            (folder / split / "a" / f"{i}.png").write_bytes(picture("PNG"))
    return folder


def read(path: Path) -> None:
    """Read the validation images, in training and in evaluation."""
    from deq_flax.data.images.labeled_datasets import ImageOptions, load_images
    from deq_flax.errors import UserError

    data = load_images(ImageOptions(name="folders", path=str(path), image_size=8, resize=10, max_damaged=2))
    count = len(data.valid)
    mask = data.valid.read(np.arange(count), None)["mask"]
    if mask.sum() + len(data.damaged.names) != count or mask[:GOOD].sum() < GOOD:
        raise SilentlyWrongError(f"{count} images, mask {mask}, damaged {data.damaged.names}")
    data.valid.read(np.arange(count), np.random.default_rng(0))
    if data.damaged.names:
        raise UserError(f"skipped {data.damaged.names!a}")


def read_scenes(path: Path) -> None:
    """The same with every image as a mask."""
    from deq_flax.data.images.scene_datasets import SceneOptions, load_scenes
    from deq_flax.errors import UserError

    sizes = {"crop_size": (8, 8), "eval_size": (20, 20), "scales": (1.0,)}
    data = load_scenes(SceneOptions(name="folders", path=str(path), max_damaged=2, **sizes), num_classes=255)
    count = len(data.valid)
    mask = data.valid.read(np.arange(count), None)["mask"]
    data.valid.read(np.arange(count), np.random.default_rng(0))
    if mask.sum() + len(data.damaged.names) != count:
        raise SilentlyWrongError(f"{count} images, mask {mask}, damaged {data.damaged.names}")
    if data.damaged.names:
        raise UserError(f"skipped {data.damaged.names!a}")


def write_scenes(folder: Path) -> Path:
    mask = io.BytesIO()
    Image.fromarray(np.ones((20, 20), np.uint8)).save(mask, "PNG")
    for split, count in (("train", 1), ("val", GOOD + 1)):
        for kind, content in (("images", picture("PNG")), ("labels", mask.getvalue())):
            (folder / split / kind).mkdir(parents=True)
            for i in range(count):
                (folder / split / kind / f"{i}.png").write_bytes(content)
    return folder


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, depth: int = 8, color: int = 2, extra: bytes = b"", rows: bytes | None = None) -> bytes:
    """A PNG of zeros, compressed as well as can be."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    if rows is None:
        row = 1 + width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] // 8
        packer, parts = zlib.compressobj(9), []
        for _ in range(min(height, (1 << 30) // max(row, 1))):
            parts.append(packer.compress(bytes(row)))
        rows = b"".join([*parts, packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def contents() -> Iterator[tuple[str, str, bytes | Callable[[], bytes]]]:
    """(class, name of the file, content or what makes it)."""
    for suffix in ("png", "jpg", "bmp", "ppm", "webp"):
        yield "programs", f"a PostScript program named .{suffix}", EPS
    yield (
        "programs",
        "a PostScript program in a DOS header named .jpeg",
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS,
    )
    for form in ("TIFF", "GIF", "ICO", "TGA", "PCX", "PDF", "JPEG2000", "SGI", "DDS", "MSP", "ICNS", "SPIDER"):
        try:
            stream, image = io.BytesIO(), Image.fromarray(np.zeros((32, 32, 3), np.uint8))
            if form == "MSP":
                image = image.convert("1")
            if form == "SPIDER":
                image = image.convert("F")
            image.save(stream, form)
        except (OSError, KeyError, ValueError):
            continue
        yield "other formats", f"{form} named .png", stream.getvalue()
    yield "other formats", "FITS named .png", b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)
    yield "other formats", "XPM named .png", b'/* XPM */\nstatic char *x[] = {\n"2 2 1 1",\n"a c #000000",\n"aa",\n"aa"\n};\n'

    yield "bombs", "60,000 x 60,000 named .png", lambda: png(60_000, 60_000, color=0)
    yield "bombs", "13,300 x 13,300 named .png", lambda: png(13_300, 13_300, color=6)
    yield "bombs", "9,400 x 9,400 named .png", lambda: png(9_400, 9_400, color=6)
    yield "bombs", "2^31 x 2^31 named .png", lambda: png(2**31 - 1, 2**31 - 1, rows=b"")
    yield "bombs", "nothing x 5 named .png", lambda: png(0, 5, rows=b"")
    yield "bombs", "100,000,000 x 1 named .png", lambda: png(100_000_000, 1, color=0)
    yield "bombs", "16 bits named .png", lambda: png(9_000, 9_000, depth=16, color=0)
    yield "bombs", "a text of 256 MB named .png", lambda: png(20, 20, extra=chunk(b"zTXt", b"a\0\0" + _zeros()))
    yield "bombs", "a color profile of 256 MB named .png", lambda: png(20, 20, extra=chunk(b"iCCP", b"a\0\0" + _zeros()))
    yield "bombs", "an international text named .png", lambda: png(20, 20, extra=chunk(b"iTXt", b"a\0\1\0\0\0" + _zeros()))
    yield "bombs", "100,000 chunks named .png", lambda: png(20, 20, extra=chunk(b"tEXt", b"a\0b") * 100_000)
    yield (
        "bombs",
        "a claim of 2 GB named .png",
        lambda: b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 0x7FFFFFFF) + b"IHDR" + bytes(40),
    )
    yield "bombs", "text of 6,000 x 6,000 named .ppm", lambda: b"P3 6000 6000 255\n" + b"0 " * (3 * 6000 * 6000)
    yield "bombs", "10^9 x 10^9 named .ppm", lambda: b"P6 1000000000 1000000000 255\n"
    yield "bombs", "10^4000 x 1 named .ppm", lambda: b"P6 1" + b"0" * 4000 + b" 1 255\n"
    yield "bombs", "a comment of 64 MB named .ppm", lambda: b"P6 #" + b"a" * (1 << 26) + b"\n2 2 255\n" + bytes(12)
    yield "bombs", "65,500 x 65,500 named .jpg", lambda: _jpeg_of(65_500)
    yield (
        "bombs",
        "-2^31 x 2 named .bmp",
        lambda: b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, -(2**31), 2, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield (
        "bombs",
        "runs of 20,000 x 20,000 named .bmp",
        lambda: (
            b"BM"
            + struct.pack("<IIIIiiHHIIIIII", 54 + 1024, 0, 54 + 1024, 40, 20_000, 20_000, 1, 8, 1, 0, 0, 0, 256, 0)
            + bytes(1024)
            + b"\xff\0" * 1000
        ),
    )
    yield "bombs", "8,300 x 8,300 named .webp", lambda: _webp_of(8_300)


@functools.cache
def _zeros() -> bytes:
    """256 MB of zeros, compressed."""
    return zlib.compress(bytes(1 << 28), 9)


def _jpeg_of(side: int) -> bytes:
    data = picture("JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def _webp_of(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side)).save(stream, "WEBP", lossless=True, method=0, quality=0)
    return stream.getvalue()


def places(folder: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """What stands in the place of an image: (name, function that puts it there)."""
    yield "a pipe", os.mkfifo
    yield "/dev/zero", lambda path: path.symlink_to("/dev/zero")
    yield "/dev/stdin", lambda path: path.symlink_to("/dev/stdin")
    yield "a link to nothing", lambda path: path.symlink_to(path.with_name("none"))
    yield "a link to itself", lambda path: path.symlink_to(path)
    yield "a folder", Path.mkdir
    yield "an empty file", Path.touch
    yield "1 TB of nothing", lambda path: (path.touch(), os.truncate(path, 1 << 40))
    yield "two folders that link to their parents", _cycles
    yield "a folder 900 deep", _deep
    yield "a name that is no text", lambda path: (path.parent / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"no image")
    yield "a name of line breaks", lambda path: path.with_name("a\n\x1b[2Jerror: b.png").write_bytes(b"no image")


def _put(content: bytes | Callable[[], bytes], path: Path) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content())


def _cycles(path: Path) -> None:
    for name in ("x", "y"):
        (path.parent / name).symlink_to("..", target_is_directory=True)
    path.write_bytes(b"no image")


def _deep(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)
    for _ in range(900):
        os.mkdir("d")
        os.chdir("d")
    Path("x.png").write_bytes(picture("PNG"))
    os.chdir(before)


def zipped(folder: Path, change: Callable[[zipfile.ZipFile], None], method: int = zipfile.ZIP_STORED) -> Path:
    """The data set as a zip file to which `change` adds."""
    tree = write_tree(folder / "tree")
    with zipfile.ZipFile(folder / "x.zip", "w", method) as archive:
        for file in sorted(tree.rglob("*.png")):
            archive.write(file, str(file.relative_to(tree)))
        change(archive)
    shutil.rmtree(tree)
    return folder / "x.zip"


def _add_bomb(archive: zipfile.ZipFile, size: int, method: int) -> None:
    info = zipfile.ZipInfo("val/a/9.png")
    info.compress_type = method
    with archive.open(info, "w", force_zip64=True) as stream:
        for _ in range(size >> 22):
            stream.write(bytes(1 << 22))


def _zip_bomb(size: int, method: int, folder: Path) -> Path:
    return zipped(folder, lambda archive: _add_bomb(archive, size, method))


def _add_member(archive: zipfile.ZipFile, method: int) -> None:
    archive.writestr("val/a/9.png", picture("PNG"), compress_type=method)


def zips() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    def nothing(archive: zipfile.ZipFile) -> None:
        pass

    for what, method in METHODS.items():
        yield f"an image by {what}", lambda folder, method=method: zipped(folder, lambda archive: _add_member(archive, method))
        yield f"all by {what}, damaged", lambda folder, method=method: _broken(zipped(folder, nothing, method))
    for what, method, size in (("bzip2", zipfile.ZIP_BZIP2, 1 << 29), ("deflate", zipfile.ZIP_DEFLATED, 1 << 32)):
        yield f"{size >> 20} MB of zeros by {what}", partial(_zip_bomb, size, method)
    yield "encrypted", lambda folder: patched(zipped(folder, nothing), flags=1)
    yield "an unknown method", lambda folder: patched(zipped(folder, nothing), method=99)
    yield "sizes of 4 GB", lambda folder: patched(zipped(folder, nothing), size=0xFFFFFFFE)
    yield (
        "a million names",
        lambda folder: zipped(folder, lambda archive: [archive.writestr(f"n{i}", b"") for i in range(100_000)] and None),
    )


def _broken(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(b"PNG") if b"PNG" in data else 60
    data[at : at + 20] = bytes(20)
    path.write_bytes(data)
    return path


def cases(random: np.random.Generator) -> Iterator[Case]:
    def among(name: str, put: Callable[[Path], object]) -> Callable[[Path], Path]:
        suffix = name.rsplit(".", 1)[-1] if " named ." in name else "png"

        def make(folder: Path) -> Path:
            put(write_tree(folder / "tree") / "val" / "a" / f"9.{suffix}")
            return folder / "tree"

        return make

    def as_mask(put: Callable[[Path], object]) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            mask = write_scenes(folder / "tree") / "val" / "labels" / f"{GOOD}.png"
            mask.unlink()
            put(mask)
            return folder / "tree"

        return make

    for kind, name, content in contents():
        put = partial(_put, content)
        yield Case(f"images: {kind}", name, among(name, put), read)
        if name.endswith(".png"):
            yield Case(f"images: {kind}", f"{name}, as a mask", as_mask(put), read_scenes)
    for name, place in places(Path()):
        yield Case("images: no files", name, among(name, place), read)
        if "folder" not in name and "name" not in name:
            yield Case("images: no files", f"{name}, as a mask", as_mask(place), read_scenes)
    for name, make in zips():
        yield Case("images: zip files", name, make, read)
    for form in ("PNG", "JPEG", "BMP", "WEBP", "PPM"):
        data = picture(form)
        for i in range(15):
            content = damaged(data, random)
            put = partial(_put, content)
            yield Case("images: damage", f"{form} {i} named .{form.lower()}", among(f" named .{form.lower()}", put), read)
