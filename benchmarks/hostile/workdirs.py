"""Workdirs whose metrics.jsonl, config.json and vocabulary.txt are not what a run wrote."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import training
from benchmarks.hostile import Case, SilentlyWrongError, damaged

LINES = b"".join(json.dumps({"step": step, "split": "train", "loss": 1.0 / step}).encode() + b"\n" for step in range(1, 20))


def read_metrics(path: Path) -> None:
    """Continue the log of a run, then plot it."""
    import matplotlib

    from deq_flax.errors import UserError
    from deq_flax.plot import PANELS, draw_panels
    from deq_flax.run_log.metrics_file import read_metrics as read
    from deq_flax.run_log.run_log import RunLog

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plotted = None
    try:
        lines = read(path)
        for panels in PANELS.values():
            figure = draw_panels(pyplot, lines, panels)
            figure.savefig(path / "curves.png", dpi=30)
            pyplot.close(figure)
    except UserError as error:
        plotted = error
    with RunLog(path, 10) as log:
        log.write(11, "train", {"loss": 1.0})
    kept = (path / "metrics.jsonl").read_bytes().splitlines()
    if any(json.loads(line)["step"] > 11 for line in kept) or json.loads(kept[-1])["step"] != 11:
        raise SilentlyWrongError(f"the log is {kept[-3:]}")
    if plotted:
        raise plotted


def metrics() -> Iterator[tuple[str, bytes]]:
    for what, line in {
        "a list": b"[]",
        "a number": b"3",
        "null": b"null",
        "a text": b'"x"',
        "an empty object": b"{}",
        "lists 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
        "objects 100,000 deep": b'{"step":' * 100_000 + b"1" + b"}" * 100_000,
        "lists 400 deep in a metric": b'{"step": 3, "split": "train", "loss": ' + b"[" * 400 + b"]" * 400 + b"}",
        "a text as step": b'{"step": "3", "split": "train"}',
        "a list as step": b'{"step": [3], "split": "train"}',
        "true as step": b'{"step": true, "split": "train", "loss": 1}',
        "a fraction as step": b'{"step": 3.5, "split": "train", "loss": 1}',
        "NaN as step": b'{"step": NaN, "split": "train", "loss": 1}',
        "10^400 as step": b'{"step": 1' + b"0" * 400 + b', "split": "train", "loss": 1}',
        "-10^400 as step": b'{"step": -1' + b"0" * 400 + b', "split": "train", "loss": 1}',
        "10^5000 as step": b'{"step": 1' + b"0" * 5000 + b', "split": "train", "loss": 1}',
        "a list as split": b'{"step": 3, "split": ["train"], "loss": 1}',
        "an object as split": b'{"step": 3, "split": {}, "loss": 1}',
        "a text as loss": b'{"step": 3, "split": "train", "loss": "1"}',
        "a list as loss": b'{"step": 3, "split": "train", "loss": [1, 2]}',
        "an object as loss": b'{"step": 3, "split": "train", "loss": {"a": 1}}',
        "10^400 as loss": b'{"step": 3, "split": "train", "loss": 1' + b"0" * 400 + b"}",
        "infinity as loss": b'{"step": 3, "split": "train", "loss": Infinity}',
        "true as loss": b'{"step": 3, "split": "train", "loss": true}',
        "-1 as grad_norm": b'{"step": 3, "split": "train", "grad_norm": -1}',
        "no UTF-8": b'{"step": 3, "split": "\xff"}',
        "zeros": bytes(1000),
        "half of a surrogate pair": b'{"step": 3, "split": "\\ud800", "\\udfff": 1}',
        "a line of 64 MB": b'{"step": 3, "split": "train", "a": "' + b"a" * (1 << 26) + b'"}',
        "a line without end": b"",
    }.items():
        yield f"{what} among lines", LINES[:300] + line + b"\n" + LINES[300:] if line else LINES[:-1]
        yield f"{what} alone", line + b"\n"
    yield "200,000 lines", LINES * 10_000
    yield "other line breaks", LINES.replace(b"\n", b"\r\n")


def read_config(path: Path) -> None:
    """Read the run's config as every command does, and begin training from it."""
    from deq_flax.config import make_task, read_run_config

    config = read_run_config(path)
    make_task(config)


def configs() -> Iterator[tuple[str, bytes]]:
    from deq_flax.config import to_dict

    whole = to_dict(training.resolved("configs/wt103.py:tiny"))
    yield "whole", json.dumps(whole).encode()
    for what, value in (
        ("a list", []),
        ("null", None),
        ("a text", "x"),
        ("a number", 3),
        ("true", True),
        ("10^400", 10**400),
        ("NaN", float("nan")),
    ):
        yield f"that is {what}", json.dumps(value).encode()
        for section in whole:
            yield f"whose {section} is {what}", json.dumps(whole | {section: value}).encode()
        for section, key in (
            ("model", "name"),
            ("model", "d_model"),
            ("model", "cutoffs"),
            ("deq", "solver"),
            ("deq", "gradient"),
            ("deq", "solver_options"),
            ("data", "name"),
            ("data", "path"),
            ("train", "seed"),
            ("eval", "max_steps_sweep"),
            ("optimizer", "name"),
        ):
            yield f"whose {section}.{key} is {what}", json.dumps(whole | {section: whole[section] | {key: value}}).encode()
    yield "without task", json.dumps({key: value for key, value in whole.items() if key != "task"}).encode()
    yield "100,000 deep", b'{"task":' * 100_000 + b"1" + b"}" * 100_000
    yield "lists 100,000 deep", b"[" * 100_000 + b"]" * 100_000
    yield "800 deep", json.dumps(whole | {"data": json.loads("[" * 800 + "]" * 800)}).encode()
    yield (
        "with options 800 deep",
        json.dumps(whole | {"deq": whole["deq"] | {"solver_options": {"memory": json.loads("[" * 800 + "]" * 800)}}}).encode(),
    )
    yield "with a key of a megabyte", json.dumps(whole | {"a" * (1 << 20): {}}).encode()
    yield "with a value of a megabyte", json.dumps(whole | {"task": "a" * (1 << 20)}).encode()
    yield "with line breaks in a key", json.dumps(whole | {"a\n\x1b[2Jerror": {}}).encode()
    yield "with 100,000 keys", json.dumps(whole | {f"a{i}": 1 for i in range(100_000)}).encode()
    yield "of 200 MB", b'{"task": "' + b"a" * 200_000_000 + b'"}'
    yield "no UTF-8", b"\xff\xfe"
    yield "empty", b""


def cases(random: np.random.Generator) -> Iterator[Case]:
    def written(name: str, content: bytes) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            (folder / name).write_bytes(content)
            return folder

        return make

    def put(name: str, how: Callable[[Path], object]) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            how(folder / name)
            return folder

        return make

    specials = {
        "a pipe": os.mkfifo,
        "/dev/zero": lambda file: file.symlink_to("/dev/zero"),
        "a folder": Path.mkdir,
        "a link to itself": lambda file: file.symlink_to(file),
    }
    for name, content in metrics():
        yield Case("workdirs: metrics.jsonl", name, written("metrics.jsonl", content), read_metrics)
    for i in range(20):
        content = damaged(LINES, random)
        yield Case("workdirs: metrics.jsonl", f"damage {i}", written("metrics.jsonl", content), read_metrics)
    for name, content in configs():
        yield Case("workdirs: config.json", name, written("config.json", content), read_config)
    for what, how in specials.items():
        yield Case("workdirs: metrics.jsonl", what, put("metrics.jsonl", how), read_metrics)
        yield Case("workdirs: config.json", what, put("config.json", how), read_config)
