"""Checkpoints of a run of which the newest is damaged, or made to harm: the one before must be taken, or one line said."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hostile import Case, SilentlyWrongError, damaged

SHAPE = (30, 40)


def weights(step: int) -> np.ndarray:
    return np.arange(1200, dtype=np.float32).reshape(SHAPE) + step


def write(folder: Path) -> Path:
    """Checkpoints of the steps 1, 2 and 3 of a run, of which 2 is the best."""
    import jax.numpy as jnp

    from deq_flax.checkpoints.checkpoints import CheckpointOptions, Checkpoints

    with Checkpoints(folder / "checkpoints", CheckpointOptions(keep_latest=3)) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            params, rest = {"w": jnp.asarray(weights(step)), "b": jnp.full((5,), step)}, {"variables": {"m": jnp.ones(3)}}
            checkpoints.save(step, params=params, rest=rest, meta={"config": {"task": "x"}}, metrics={"loss": loss})
    return folder


def read(path: Path) -> None:
    """Continue the run, load its best weights, and load one checkpoint's record."""
    import jax
    import jax.numpy as jnp

    from deq_flax.checkpoints.checkpoints import Checkpoints
    from deq_flax.checkpoints.loading import load_meta, load_params
    from deq_flax.errors import UserError
    from deq_flax.pretrained import stored_config

    params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32), "b": jnp.zeros(5, int)}
    variables = {"m": jnp.zeros(3)}
    latest = Checkpoints(path / "checkpoints", read_only=True).restore_latest(params=params, rest={"variables": variables})
    best = load_params(path, params, variables)
    for restored in (latest, best):
        if restored is not None and not np.array_equal(restored.params["w"], weights(restored.step)):
            raise SilentlyWrongError(f"step {restored.step} holds {np.asarray(restored.params['w'])[0, :3]}")
    if latest is None or latest.step not in (2, 3):
        raise SilentlyWrongError(f"the latest is {latest and latest.step}")
    for step in (3, latest.step):
        try:
            stored_config(load_meta(path / "checkpoints" / str(step)))
        except UserError:
            continue
        raise SilentlyWrongError("a config of nothing")


def changed_record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A record that states something else, its checksum included: whoever wrote it knew the format."""

    def spoil(folder: Path) -> None:
        from deq_flax.checkpoints.stored_step import _json_checksum

        file = folder / "meta" / "metadata"
        record = json.loads(file.read_text())
        record.pop("checksum")
        record = change(record)
        if isinstance(record, dict):
            with contextlib.suppress(RecursionError):
                record = record | {"checksum": _json_checksum(record)}
        file.write_text(json.dumps(record) if not isinstance(record, str) else record)

    return spoil


def records() -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    for what, value in (
        ("a list", []),
        ("null", None),
        ("a text", "x"),
        ("a number", 3),
        ("an empty object", {}),
        ("-1", -1),
        ("10^400", 10**400),
    ):
        for key in ("step", "metrics", "arrays", "versions", "config"):
            yield f"whose {key} is {what}", lambda record, key=key, value=value: record | {key: value}
        yield (
            f"whose parameters are {what}",
            lambda record, value=value: record | {"arrays": record["arrays"] | {"params": value}},
        )
        yield (
            f"one of whose arrays is {what}",
            lambda record, value=value: (
                record | {"arrays": record["arrays"] | {"params": record["arrays"]["params"] | {"w": value}}}
            ),
        )
        for part in ("shape", "dtype", "crc32"):
            yield (
                f"with an array whose {part} is {what}",
                lambda record, part=part, value=value: (
                    record
                    | {
                        "arrays": record["arrays"]
                        | {"params": record["arrays"]["params"] | {"w": record["arrays"]["params"]["w"] | {part: value}}}
                    }
                ),
            )
        yield f"whose loss is {what}", lambda record, value=value: record | {"metrics": {"loss": value}}
        yield f"that is {what}", lambda record, value=value: json.dumps(value)
    for key in ("step", "metrics", "arrays", "versions"):
        yield f"without {key}", lambda record, key=key: {name: value for name, value in record.items() if name != key}
    yield "100,000 deep", lambda record: '{"config":' * 100_000 + "1" + "}" * 100_000
    yield "with a config 800 deep", lambda record: record | {"config": json.loads("[" * 800 + "]" * 800)}
    yield "of 100 MB", lambda record: record | {"text": "a" * 100_000_000}
    yield (
        "with a name of a megabyte",
        lambda record: (
            record
            | {"arrays": record["arrays"] | {"params": {"a" * (1 << 20): {"shape": [1], "dtype": "float32", "crc32": 0}}}}
        ),
    )
    yield (
        "with a million arrays",
        lambda record: (
            record
            | {
                "arrays": record["arrays"]
                | {"params": {f"a{i}": {"shape": [1], "dtype": "float32", "crc32": 0} for i in range(200_000)}}
            }
        ),
    )


def copied(later: str, folder: Path) -> None:
    shutil.copytree(folder, folder.with_name(later))


def replaced(name: str, put: Callable[[Path], object], folder: Path) -> None:
    file = folder / name
    file.unlink()
    put(file)


def cases(random: np.random.Generator) -> Iterator[Case]:
    def case(kind: str, name: str, spoil: Callable[[Path], object]) -> Case:
        def make(folder: Path) -> Path:
            spoil(write(folder) / "checkpoints" / "3")
            return folder

        return Case(f"checkpoints: {kind}", name, make, read)

    for name, change in records():
        yield case("records", name, changed_record(change))
    for later in ("7", "007", "99999999999999999999", "٣"):
        yield case("copies", f"step 3 as {later}", partial(copied, later))
        yield case("copies", f"step 2 as {later}", lambda folder, later=later: copied(later, folder.with_name("2")))
    yield case("copies", "step 2 as 3", lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.with_name("2"), folder)))
    yield case(
        "copies",
        "parameters of step 2 in 3",
        lambda folder: (shutil.rmtree(folder / "params"), shutil.copytree(folder.with_name("2") / "params", folder / "params")),
    )
    specials = {
        "a pipe": os.mkfifo,
        "/dev/zero": lambda file: file.symlink_to("/dev/zero"),
        "a folder": Path.mkdir,
        "nothing": lambda file: None,
    }
    for what, put in specials.items():
        for name in ("meta/metadata", "params/manifest.ocdbt", "params/_METADATA"):
            yield case("no files", f"{what} as {name}", partial(replaced, name, put))
    texts = {
        "deep": b"[" * 100_000,
        "a list": b"[]",
        "a number": b"1",
        "null": b"null",
        "an empty object": b"{}",
        "no UTF-8": b"\xff",
    }
    for what, content in texts.items():
        yield case(
            "damage",
            f"{what} as params/_METADATA",
            lambda folder, content=content: (folder / "params" / "_METADATA").write_bytes(content),
        )

    def flipped(number: int, seed: int, folder: Path) -> None:
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
        file, chance = files[number % len(files)], np.random.default_rng(seed)
        data = bytearray(file.read_bytes())
        data[int(chance.integers(len(data)))] ^= 1 << int(chance.integers(8))
        file.write_bytes(data)

    def spoiled(number: int, seed: int, folder: Path) -> None:
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
        file = files[number % len(files)]
        file.write_bytes(damaged(file.read_bytes(), np.random.default_rng(seed)))

    for i in range(80):
        yield case("damage", f"a flipped bit {i}", partial(flipped, i, i))
        yield case("damage", f"damage {i}", partial(spoiled, i, i))
    for i in range(60):
        seed = int(random.integers(1 << 30))
        yield case(
            "damage",
            f"a flipped bit in params/_METADATA {i}",
            lambda folder, seed=seed: _flip(folder / "params" / "_METADATA", seed),
        )


def _flip(file: Path, seed: int) -> None:
    chance = np.random.default_rng(seed)
    data = bytearray(file.read_bytes())
    data[int(chance.integers(len(data)))] ^= 1 << int(chance.integers(8))
    file.write_bytes(data)
