"""Weights in place of those that `deq_flax.convert` reads: pickles, archives, headers, names and shapes made to harm."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import training
from benchmarks.hostile import Case, damaged
from benchmarks.hostile.archives import METHODS, patched, write_bomb, write_zip

CONFIGS = {"deq_transformer": "configs/wt103.py:base", "mdeq": "configs/cifar10.py:large"}
SMALL = {
    "d_model": 8,
    "d_embed": 8,
    "n_head": 2,
    "d_head": 4,
    "d_inner": 16,
    "vocab_size": 30,
    "cutoffs": (10, 20),
    "div_value": 2,
}
PROTOCOL = b"\x80\x02"
GIANTS = (10**10, 10**18, 10**30)


def read(path: Path) -> None:
    """Read all that is in a file, then convert it."""
    from deq_flax.convert import AUTO_CONFIGS, convert
    from deq_flax.torch_checkpoint import head_of, model_of, open_tensors

    with open_tensors(path) as file:
        key = model_of(file.tensors), head_of(file.tensors)
        for name in list(file.tensors)[:200]:
            file.read(name)
    config = training.resolved(f"configs/{AUTO_CONFIGS[key]}.py")
    convert(path, path.parent / "out", config, auto=True, given={"downsample"})


# The instructions of a pickle.


def number(x: int) -> bytes:
    if abs(x) < 1 << 31:
        return b"J" + struct.pack("<i", x)
    raw = x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw)) + raw


def text(x: str | bytes) -> bytes:
    raw = x.encode("utf-8", "surrogatepass") if isinstance(x, str) else x
    return b"X" + struct.pack("<I", len(raw)) + raw


def several(items: list[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def called(name: str, arguments: bytes) -> bytes:
    return b"c" + name.encode() + b"\n" + arguments + b"R"


def tensor(shape: tuple[int, ...], strides: tuple[int, ...] | None = None, *, numel: int = 4, key: str = "0") -> bytes:
    if strides is None:
        strides = tuple(int(np.prod([1.0 * n for n in shape[i + 1 :]])) if 0 not in shape else 1 for i in range(len(shape)))
    reference = several([text("storage"), b"ctorch\nFloatStorage\n", text(key), text("cpu"), number(numel)]) + b"Q"
    parts = [reference, number(0), several([*map(number, shape)]), several([*map(number, strides)]), b"\x89", b"}"]
    return called("torch._utils\n_rebuild_tensor_v2", several(parts))


def dictionary(entries: list[tuple[bytes, bytes]]) -> bytes:
    return PROTOCOL + b"}(" + b"".join(key + value for key, value in entries) + b"u."


def as_zip(data: bytes, path: Path) -> Path:
    return write_zip(path, {"x/data.pkl": data, "x/version": b"3\n", "x/data/0": bytes(16)})


def as_legacy(data: bytes, path: Path, keys: bytes | None = None) -> Path:
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, machine)]
    path.write_bytes(b"".join([*head, data, keys or pickle.dumps(["0"], protocol=2), struct.pack("<q", 4), bytes(16)]))
    return path


def nested(depth: int, opening: bytes, closing: bytes, core: bytes = b"K\x01") -> bytes:
    return opening * depth + core + closing * depth


def pickles() -> Iterator[tuple[str, str, bytes]]:
    """(class, name, pickle)."""
    w = tensor((4,))
    for depth in (100, 5_000, 1_000_000):
        deep = {
            "tuple": nested(depth, b"", b"\x85"),
            "list": nested(depth, b"]", b"a"),
            "dict": nested(depth, b"}K\x01", b"s"),
        }
        for what, value in deep.items():
            yield "recursion", f"a {what} {depth} deep as key", dictionary([(value, w)])
            yield "recursion", f"a {what} {depth} deep as value", dictionary([(text("a"), value)])
        yield "recursion", f"a tuple {depth} deep beside", dictionary([(text("w"), w), (deep["tuple"], b"K\x01")])
        yield "recursion", f"a tuple {depth} deep alone", PROTOCOL + deep["tuple"] + b"."
        yield "recursion", f"a reference {depth} deep", PROTOCOL + deep["tuple"] + b"Q."
        yield (
            "recursion",
            f"a call of a call, {depth} deep",
            PROTOCOL + nested(depth, b"ccollections\nOrderedDict\n", b"\x85R") + b".",
        )
        stub = b"ctorch._tensor\n_rebuild_from_type_v2\n"
        yield "recursion", f"arguments {depth} deep", PROTOCOL + stub + nested(depth, b"(" + stub + b"N", b"t") + b"R."
    yield "recursion", "a list in itself", dictionary([(text("a"), b"]q\x01h\x01a")])
    yield "recursion", "a tuple of a list in itself as key", dictionary([(b"]q\x01h\x01\x85ah\x01\x85", w)])
    laughs = b"K\x01K\x01\x86q\x01"
    laughs += b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(1, 60))
    yield "recursion", "2^60 elements as key", dictionary([(laughs, w)])
    yield "recursion", "2^60 elements as value", dictionary([(text("v"), laughs), (text("w"), w)])

    pairs = b"](" + b"".join(number(i) + b"N\x86" for i in range(200_000)) + b"eq\x01"
    copies = b"".join(b"ccollections\nOrderedDict\nh\x01\x85Rr" + struct.pack("<I", i) for i in range(2, 2000))
    yield "bombs", "an ordered dictionary copied 2,000 times", PROTOCOL + pairs + copies + b"."
    big = text(b"a" * (1 << 23)) + b"q\x01"
    sizes = b"".join(b"ctorch\nSize\nh\x01\x85Rr" + struct.pack("<I", i) for i in range(2, 500))
    yield "bombs", "a size of a long text, 500 times", PROTOCOL + big + sizes + b"."
    encoded = b"".join(b"c_codecs\nencode\nh\x01" + text("latin1") + b"\x86Rr" + struct.pack("<I", i) for i in range(2, 500))
    yield "bombs", "a text encoded 500 times", PROTOCOL + big + encoded + b"."
    for what, code in (
        ("dictionaries", b"}"),
        ("lists", b"]"),
        ("marks", b"("),
        ("None", b"N"),
        ("frames", b"\x95" + bytes(8)),
    ):
        yield "bombs", f"16 million bytes of {what}", PROTOCOL + code * (((1 << 24) - 10) // len(code)) + b"."
    yield "bombs", "16 million bytes in the memo", PROTOCOL + b"N" + b"\x94" * ((1 << 24) - 10) + b"."
    yield (
        "bombs",
        "an integer of 16 million bytes",
        dictionary([(b"\x8b" + struct.pack("<i", 1 << 23) + b"\x7f" * (1 << 23), w)]),
    )
    yield "bombs", "decimals", PROTOCOL + b"I" + b"9" * (1 << 23) + b"\n."
    yield "bombs", "a claim of 2^40 bytes", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."
    yield "bombs", "a place 2^31 in the memo", PROTOCOL + b"}r\xff\xff\xff\x7f."
    yield (
        "bombs",
        "a tensor that a million entries share",
        dictionary([(text("w"), w + b"q\x01"), *((number(i), b"h\x01") for i in range(700_000))]),
    )

    keys = {
        "an integer": number(7),
        "a large integer": number(10**4000),
        "an integer of 5,000 digits": number(10**5000),
        "None": b"N",
        "bytes": b"C\x01a",
        "a number": b"G" + struct.pack(">d", float("nan")),
        "a tensor": tensor((4,)),
        "a list": b"]",
        "a name": b"ctorch\nFloatStorage\n",
        "True": b"\x88",
        "a tuple of integers": b"K\x01K\x02\x86",
        "an empty text": text(""),
    }
    for what, key in keys.items():
        yield "values", f"{what} as the only key", dictionary([(key, w)])
        yield "values", f"{what} as one of two keys", dictionary([(text("w"), w), (key, w)])
        yield "values", f"{what} as a key within", dictionary([(text("model"), b"}" + key + w + b"s")])
    for what, key in (("all", b"}"), ("a tensor", w), ("a name", b"ctorch\nSize\n"), ("a number", b"K\x01")):
        yield "values", f"attributes set on {what}", PROTOCOL + key + b"}b."
        yield "values", f"{what} called", PROTOCOL + key + b")R."
        yield "values", f"{what} as a storage", PROTOCOL + key + b"Q."
    for shape in ((10**5000,), (-1,), (1,) * 9, (10**5000, 0), (2**63, 0)):
        yield (
            "values",
            f"a shape of {len(shape)} sizes, the first of {len(str(len(bin(shape[0]))))} digits",
            dictionary([(text("w"), tensor(shape, (1,) * len(shape)))]),
        )
    yield "values", "a storage of 10^5000 elements", dictionary([(text("w"), tensor((1,), (1,), numel=10**5000))])
    yield "values", "a storage whose name is long", dictionary([(text("w"), tensor((1,), (1,), key="k" * (1 << 20)))])


def functions(proof: Path) -> Iterator[tuple[str, bytes]]:
    """(name, pickle that would create the file `proof`)."""

    class Call:
        def __init__(self, function: Callable, *arguments: object):
            self.call = function, arguments

        def __reduce__(self) -> tuple:
            return self.call

    command = f"touch {proof}"
    for function, argument in (
        (os.system, command),
        (os.popen, command),
        (eval, f"open({str(proof)!r}, 'w')"),
        (exec, f"open({str(proof)!r}, 'w')"),
        (open, str(proof)),
    ):
        for protocol in range(6):
            arguments = (argument, "w") if function is open else (argument,)
            yield (
                f"{function.__name__}, protocol {protocol}",
                pickle.dumps({"w": Call(function, *arguments)}, protocol=protocol),
            )
    yield "instance", b"(S'" + command.encode() + b"'\nios\nsystem\n."
    yield "object", b"(cos\nsystem\nS'" + command.encode() + b"'\no."
    yield "extension", PROTOCOL + b"\x82\x01."
    yield "a megabyte of names", PROTOCOL + b"".join(b"cm%d\nf\n0" % i for i in range(80_000)) + b"N."
    yield "a name of a megabyte", PROTOCOL + b"c" + b"m" * (1 << 20) + b"\nf\n."


def names() -> Iterator[tuple[str, list[str]]]:
    yield "of a megabyte", ["a" * (1 << 20)]
    yield "of a megabyte, in the model's place", ["func." + "a" * (1 << 20), "word_emb.emb_layers.0.weight"]
    yield "made for slow patterns", ["parametrizations." * 60_000]
    yield "made for slow patterns, with ends", ["parametrizations.a." * 50_000 + "original2"]
    yield "of dots", ["." * (1 << 20)]
    yield "many prefixes", ["module." * 150_000, "module." * 150_000 + "a"]
    yield "with line breaks and terminal codes", ["a\nerror: b\r\x1b[2J\x07", "func.\u202e"]
    yield "with half of a surrogate pair", ["func.\ud800", "\udfff"]
    yield "the same twice after renaming", ["parametrizations.weight.original0", "weight_g"]
    yield "a hundred thousand", [f"func.a{i}" for i in range(100_000)]
    yield "a hundred thousand tables", [f"word_emb.emb_layers.{i}.weight" for i in range(100_000)]
    yield (
        "a hundred thousand branches",
        [f"fullstage.branches.{i // 2}.blocks.0.conv{i % 2 + 1}.weight" for i in range(100_000)],
    )


def whole(model: str) -> dict[str, np.ndarray]:
    """All tensors of a small model, by their original names."""
    from deq_flax.models import abstract_model
    from deq_flax.torch_checkpoint import FAMILIES, family_of, slots

    changes = {f"model.{key}": value for key, value in SMALL.items()} if model == "deq_transformer" else {}
    options = training.resolved(CONFIGS[model], changes).model
    wanted = slots(FAMILIES[family_of(model)], abstract_model(options))
    return {slot.theirs: np.full(slot.shape, 0.1, np.float32) for slot in wanted}


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], replaced: Mapping[str, bytes]) -> Path:
    """A file of torch.save; `replaced`: tensors written by hand, on a storage of their own of four elements."""
    entries, contents = [], {"x/version": b"3\n", "x/data/0": bytes(16)}
    for i, (name, array) in enumerate(arrays.items(), 1):
        if name not in replaced:
            contents[f"x/data/{i}"] = array.tobytes()
            strides = tuple(step // 4 for step in array.strides)
            entries.append((text(name), tensor(array.shape, strides, numel=array.size, key=str(i))))
        else:
            entries.append((text(name), replaced[name]))
    return write_zip(path, contents | {"x/data.pkl": dictionary(entries)})


def shapes() -> Iterator[tuple[str, str, str, bytes]]:
    """(model, name of the attack, tensor, instructions in its place)."""
    inferred = {
        "deq_transformer": ["inject_conv.weight", "func.dec_attn.r_w_bias", "func.pos_ff.ff1_net.bias", "crit.cluster_weight"]
        + [f"word_emb.emb_layers.{i}.weight" for i in range(3)]
        + ["word_emb.emb_projs.0.weight", "func.dec_attn.qkv_net.weight"],
        "mdeq": [f"fullstage.branches.0.blocks.0.conv{k}.weight_v" for k in (1, 2)]
        + [
            "downsample.0.weight",
            "classifier.weight",
            "incre_modules.0.0.conv1.weight",
            "fullstage.branches.1.blocks.0.conv1.weight_v",
        ],
    }
    for model, tensors in inferred.items():
        for name in tensors:
            yield model, "a scalar", name, tensor((), ())
            yield model, "nothing", name, tensor((0,), (1,))
            yield model, "nothing, of two axes", name, tensor((0, 0), (1, 1))
            yield model, "eight axes", name, tensor((1,) * 8, (1,) * 8)
            for giant in GIANTS:
                yield (
                    model,
                    f"{giant:.0e} times nothing",
                    name,
                    tensor((giant, 0, 1, 1)[: 4 if model == "mdeq" else 2], (1,) * (4 if model == "mdeq" else 2)),
                )
                yield (
                    model,
                    f"nothing times {giant:.0e}",
                    name,
                    tensor((0, giant, 1, 1)[: 4 if model == "mdeq" else 2], (1,) * (4 if model == "mdeq" else 2)),
                )
            yield (
                model,
                "one element 10^5 times",
                name,
                tensor((10**5, 1, 1, 1)[: 4 if model == "mdeq" else 2], (0,) * (4 if model == "mdeq" else 2)),
            )


def write_safetensors(path: Path, header: object, content: bytes = bytes(16)) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content)
    return path


def headers() -> Iterator[tuple[str, object]]:
    good = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    yield "100,000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield "an array 100,000 deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "of no object", b"{}" + b" " * 30
    yield "a shape of 10^30", {"a": good | {"shape": [10**30]}}
    yield "a shape of 2^63 times nothing", {"a": good | {"shape": [2**63, 0], "data_offsets": [0, 0]}}
    yield "a million empty tensors", {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(500_000)}
    yield "a name of ten megabytes", {"a" * 10_000_000: good}
    yield "a name twice", b'{"a":' + json.dumps(good).encode() + b',"a":' + json.dumps(good).encode() + b"}"
    yield "no shape", {"a": {"dtype": "F32", "data_offsets": [0, 16]}}
    yield "strange values", {"a": {"dtype": 1, "shape": "4", "data_offsets": None}}
    yield "offsets backwards", {"a": good | {"data_offsets": [16, 0]}}
    yield "metadata of lists", {"__metadata__": [1], "a": good}
    yield "nulls", b'{"\\u0000\\ud800":' + json.dumps(good).encode() + b"}"


def npy(header: str | bytes, content: bytes = bytes(16), version: int = 1) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + (struct.pack("<H", len(raw)) if version == 1 else struct.pack("<I", len(raw)))
        + raw
        + content
    )


def npy_headers() -> Iterator[tuple[str, bytes]]:
    form = "{'descr': %s, 'fortran_order': %s, 'shape': %s}\n"
    yield "brackets 5,000 deep", npy("(" * 5_000 + ")" * 5_000)
    yield "signs 9,000 long", npy("-" * 9_000 + "1")
    yield "no dictionary", npy("[1, 2]")
    yield "a size of 10^30", npy(form % ("'<f4'", "False", f"({10**30},)"))
    yield "a size of 10^4000", npy(form % ("'<f4'", "False", f"({10**4000},)"))
    yield "10^30 times nothing", npy(form % ("'<f4'", "False", f"({10**30}, 0)"), b"")
    yield "a negative size", npy(form % ("'<f4'", "False", "(-4,)"))
    yield "a fractional size", npy(form % ("'<f4'", "False", "(4.0,)"))
    yield "a size of text", npy(form % ("'<f4'", "False", "('4',)"))
    yield "40 axes", npy(form % ("'<f4'", "False", f"{(1,) * 40}"), bytes(4))
    yield "objects", npy(form % ("'|O'", "False", "(2,)"))
    yield "text", npy(form % ("'<U1'", "False", "(4,)"))
    yield "fields", npy(form % ("[('a', '<f4')]", "False", "(4,)"))
    yield "fields in fields", npy(form % ("[('a', " * 90 + "'<f4'" + ")]" * 90, "False", "(4,)"))
    yield "elements of 2 GB", npy(form % ("'V2147483647'", "False", "(1,)"))
    yield "a type with a size that wraps", npy(form % ("('<f4', (2147483647, 2147483647))", "False", "(1,)"))
    yield "a header of 60,000 bytes", npy(" " * 60_000 + form % ("'<f4'", "False", "(4,)"))
    yield "a header that is not there", npy(b"", version=2)[:8] + b"\xff\xff\xff\xff"
    yield "version 9", b"\x93NUMPY\x09\x00" + bytes(20)
    yield "an unknown type", npy(form % ("'<q9'", "False", "(4,)"))
    yield "a program", npy("__import__('os').system('true')")


def zips() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    good = {"x/data.pkl": dictionary([(text("w"), tensor((4,)))]), "x/data/0": bytes(16)}
    n = 1 << 30
    large = {"x/data.pkl": dictionary([(text("w"), tensor((n,), (1,), numel=n))])}
    for what, method in METHODS.items():
        yield f"compressed by {what}", lambda path, method=method: write_zip(path, good, method)
        yield f"256 MB of zeros by {what}", lambda path, method=method: write_bomb(path, large, "x/data/0", 1 << 28, method)
    yield "4 GB of zeros", lambda path: write_bomb(path, large, "x/data/0", 4 * n)
    filled = {"x/fill": bytes(1 << 24)}
    part = {"x/data.pkl": dictionary([(text("w"), tensor((400_000_000,), (1,), numel=400_000_000))])}
    yield "1.6 GB of zeros beside 16 MB", lambda path: _padded(write_bomb(path, part, "x/data/0", 1_600_000_000), filled)
    yield "encrypted", lambda path: patched(write_zip(path, good), flags=1)
    yield "an unknown method", lambda path: patched(write_zip(path, good), method=99)
    yield "sizes of 4 GB", lambda path: patched(write_zip(path, good), size=0xFFFFFFFE)
    yield "sizes of nothing", lambda path: patched(write_zip(path, good), size=0)
    yield "200,000 entries", lambda path: write_zip(path, good | {f"x/{i}": b"" for i in range(130_000)})
    yield (
        "100,000 arrays",
        lambda path: write_zip(
            path,
            dict.fromkeys(
                (f"{i}.npy" for i in range(100_000)), npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}\n", bytes(4))
            ),
        ),
    )
    yield "names that lead away", lambda path: write_zip(path, good | {"../../../tmp/x": b"", "/etc/x": b""})
    yield "no entries", lambda path: write_zip(path, {})
    yield "a directory alone", lambda path: _written(path, b"PK\x05\x06" + bytes(18))


def _padded(path: Path, contents: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in contents.items():
            archive.writestr(name, np.random.default_rng(0).bytes(len(content)))
    return path


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def special() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    yield "a pipe", lambda path: (os.mkfifo(path), path)[1]
    yield "/dev/zero", lambda path: Path("/dev/zero")
    yield "a link to /dev/urandom", lambda path: (path.symlink_to("/dev/urandom"), path)[1]
    yield "a link to itself", lambda path: (path.symlink_to(path), path)[1]
    yield "a folder", lambda path: path.parent
    yield "a socket", _socket
    yield "nothing", lambda path: path
    yield "empty", lambda path: _written(path, b"")
    yield "4 TB of nothing", _sparse


def _socket(path: Path) -> Path:
    import socket

    before = os.getcwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # the path of a socket must be short
        server.bind(path.name)
    os.chdir(before)
    return path


def _sparse(path: Path) -> Path:
    path.write_bytes(b"\x80\x02")
    os.truncate(path, 4 << 40)
    return path


def cases(random: np.random.Generator) -> Iterator[Case]:
    def case(kind: str, name: str, make: Callable[[Path], Path]) -> Case:
        return Case(f"weights: {kind}", name, lambda folder: make(folder / "x.pth"), read)

    for kind, name, data in pickles():
        yield case(kind, f"{name}, zip", partial(as_zip, data))
        if kind != "values" or "key" in name:
            yield case(kind, f"{name}, legacy", partial(as_legacy, data))
    yield case(
        "recursion",
        "the keys of storages",
        lambda path: as_legacy(dictionary([]), path, PROTOCOL + nested(10**6, b"", b"\x85") + b"."),
    )
    proof = Path("/tmp/deq_flax-attack-proof")
    for name, data in functions(proof):
        yield case("functions", name, partial(as_zip, data))
    for name, listed in names():
        yield case(
            "names",
            name,
            lambda path, listed=listed: as_zip(dictionary([(text(n), tensor((2, 2), (2, 1))) for n in listed]), path),
        )
    memory: dict[str, dict[str, np.ndarray]] = {}
    for model, attack, name, replaced in shapes():

        def make(path: Path, model: str = model, name: str = name, replaced: bytes = replaced) -> Path:
            memory[model] = memory.get(model) or whole(model)
            return write_tensors(path, memory[model], {name: replaced})

        yield case("sizes", f"{model}: {attack} as {name}", make)
    for name, make in zips():
        yield case("zip files", name, make)
    for name, header in headers():
        yield case("safetensors", name, lambda path, header=header: write_safetensors(path, header))
    for name, data in npy_headers():
        yield case("npz", name, lambda path, data=data: write_zip(path, {"w.npy": data}))
    for name, make in special():
        yield case("no files", name, make)
    stream = io.BytesIO()
    np.savez(stream, a=np.ones((2, 3), np.float32), b=np.ones(4))
    good = dictionary([(text("a"), tensor((2, 2), (2, 1))), (text("b"), tensor((4,), (1,)))])
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    originals = {"npz": stream.getvalue()}
    for form, write in (("zip", as_zip), ("legacy", as_legacy)):
        originals[form] = write(good, folder / f"deq_flax-attack-{os.getpid()}").read_bytes()
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    originals["safetensors"] = write_safetensors(folder / f"deq_flax-attack-{os.getpid()}", header).read_bytes()
    (folder / f"deq_flax-attack-{os.getpid()}").unlink()
    for form, data in originals.items():
        for i in range(25):
            yield case("damage", f"{form} {i}", partial(lambda data, path: _written(path, data), damaged(data, random)))
