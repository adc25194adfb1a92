"""What every recipe costs on TPUs, by the account of their compiler: the tables of docs/accelerators.md.

    python -m benchmarks.accelerators [--only REGEX] [--changed] [--limit SECONDS] [--results FILE] [--write]

The training step of each recipe is compiled for each topology in a process of its own (`python -m deq_flax.compile`), in
bfloat16, at a fixed number of samples a chip. No TPU, data or weights are needed, but libtpu (requirements-tpu.txt). Every
account is kept in FILE, and those that are there are not compiled again: what was interrupted goes on. With --changed those are
whose program, or whose version of JAX or of libtpu, is no longer that of the account; to find out takes seconds for a row.
--limit 0 compiles nothing, and makes the tables of what is there.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import records, tables, training

SAMPLES = {
    **{f"wt103:{variant}": 7 for variant in ("base", "ift", "reg", "preln_reg", "ift_jr", "deq_lm", "explicit", "proposal")},
    **{"cifar10:large": 16, "cifar10:tiny": 8, "cifar10:large_reg": 24, "cifar10:phantom": 16},
    **{f"imagenet:{variant}": 16 for variant in ("small", "large", "phantom", "small_reg", "large_reg", "xl")},
    **{"cityscapes:small": 1, "cityscapes:large": 1, "cityscapes:xl": 1},
    **{"sudoku:extreme_eqr": 96, "sudoku:extreme_trm": 96, "maze:unique_eqr": 96, "maze:unique_trm": 96},
    **{"sudoku:four": 8, "sudoku:six": 8, "sudoku:nine": 8, "maze:small": 4},
    **{"prefix_sums": 13, "state_tracking:a5": 13, "state_tracking:s5": 13},
}
"""Samples a chip by recipe: its batch on eight chips, or as near to that as can be split."""
HOSTS = {"v5e:2x4": 8, "v6e:2x4": 8, "v5p:2x2x1": 4}
"""Chips of one host."""
PODS = {"v5e:16x16": 256, "v6e:16x16": 256, "v5p:8x8x8": 512}
"""Chips of a pod, or half of one."""
ON_PODS = ("wt103:base", "imagenet:large")
_HALF = "solver_options={'history_dtype': 'bfloat16'}"
VARIATIONS = {
    "wt103:base": [("mesh.fsdp=8",), ("mesh.tensor=2",), (f"deq.backward_{_HALF}",)],
    "cifar10:large": [(f"deq.{_HALF}", f"deq.backward_{_HALF}")],
}
"""Changes to a recipe's config, each compiled on one host of v5e."""
RESULTS = Path(__file__).parent / "accelerators.jsonl"


@dataclass(frozen=True)
class Row:
    """A program to compile."""

    recipe: str
    topology: str
    chips: int
    variation: tuple[str, ...] = ()
    """Further changes to the config, KEY=VALUE each."""

    def changes(self) -> dict[str, Any]:
        """Changes to the config."""
        batch = self.chips * SAMPLES[self.recipe] // (2 if "mesh.tensor=2" in self.variation else 1)
        found = {"data.batch_size": batch, "data.eval_batch_size": batch, "model.dtype": "bfloat16"}
        named = (change.split("=", 1) for change in self.variation)
        return found | {name: ast.literal_eval(value) for name, value in named}

    def command(self) -> list[str]:
        """The command that compiles it."""
        flags = [f"--config.{name}={value}" for name, value in self.changes().items()]
        head = [sys.executable, "-m", "deq_flax.compile", "--config", self.recipe, "--topology", self.topology]
        return [*head, "--step", "train", "--json", *flags]

    def program(self) -> str:
        """The fingerprint of its program."""
        from deq_flax.compilation import chips
        from deq_flax.compilation.lower import lower_steps
        from deq_flax.compilation.stand_in import without_data

        config = training.resolved(self.recipe, self.changes())
        _, devices = chips.topology_devices(self.topology)
        return next(lower_steps(without_data(config), devices, names=["train"])).fingerprint

    @property
    def key(self) -> str:
        return " ".join((self.recipe, self.topology, *self.variation))


def rows() -> list[Row]:
    """All programs, those that matter most first."""
    first = [Row("wt103:base", topology, chips) for topology, chips in HOSTS.items()]
    first += [Row(recipe, "v5e:2x4", 8, variation) for recipe, found in VARIATIONS.items() for variation in found]
    found = [*first, *(Row(recipe, topology, chips) for topology, chips in PODS.items() for recipe in ON_PODS)]
    found += [Row(recipe, topology, chips) for topology, chips in HOSTS.items() for recipe in SAMPLES]
    return [*dict.fromkeys(found)]


def compiled(row: Row, limit: float) -> dict[str, Any]:
    """The account of a row, or why there is none."""
    start, environment = time.perf_counter(), os.environ | {"PYTHONPATH": os.pathsep.join(["", *sys.path])}
    head = {"key": row.key, "versions": versions()}
    try:
        done = subprocess.run(row.command(), env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return head | {"error": f"not compiled within {limit:.0f} s"}
    head["seconds"] = round(time.perf_counter() - start, 1)
    if done.returncode:
        return head | {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return head | json.loads(done.stdout)["steps"]["train"]


def versions() -> dict[str, str]:
    """What a program and its cost depend on beside our code."""
    return {name: version(name) for name in ("jax", "libtpu")}


def changed(row: Row, account: Mapping[str, Any]) -> bool:
    """Whether the account is of another program, or by another compiler."""
    return account.get("versions") != versions() or account.get("program") != row.program()


def shown(row: Row, account: Mapping[str, Any]) -> list[str]:
    """The cells of a row."""
    label = " ".join(f"`{name}`" for name in (row.recipe, *row.variation))
    if "error" in account:
        return [label, account["error"], *[""] * 7]
    held = account["bytes"]
    stored = sum(held.get(kind, 0) for kind in ("parameters", "optimizer", "carry"))
    if not account["fits"]:
        return [label, f"**does not fit**: {held['all'] / 1e9:.1f} GB", *[""] * 7]
    parts = account["parts"]
    looped = ", ".join(f"{n['count']} {kind}" for kind, n in account["collectives"]["in_loops"].items())
    return [
        label,
        f"{stored / 1e9:.2f} + {held['temporary'] / 1e9:.2f}",
        *(_part(parts.get(name)) for name in ("forward iteration", "adjoint iteration", "outside")),
        f"{1e3 * account['seconds']:.1f}",
        f"{account['utilization']:.0%}",
        looped or "none",
        f"{account['compile_seconds']:.0f}",
    ]


def _part(part: dict[str, Any] | None) -> str:
    if part is None:
        return ""
    times = f" x {part['iterations']}" if part["iterations"] > 1 else ""
    ratio = f" ({part['cycles'] / part['product_cycles']:.2f})" if part["product_cycles"] else ""
    return f"{part['cycles'] / 1e6:.3g}{ratio}{times}"


HEAD = ["recipe", "stored + temporary, GB", "forward iteration", "adjoint iteration", "outside"]
HEAD += ["ms a step", "of the peak", "collectives in loops", "s to compile"]


def text(accounts: records.Records) -> str:
    """The tables, and what made them."""
    made = {", ".join(f"{name} {number}" for name, number in account["versions"].items()) for account in accounts.values()}
    blocks = [f"Compiled with {'; '.join(sorted(made))}.\n"]
    for topology, chips in {**HOSTS, **PODS}.items():
        wanted = [row for row in rows() if row.topology == topology and row.key in accounts]
        wanted.sort(key=lambda row: ([*SAMPLES].index(row.recipe), bool(row.variation)))
        if wanted:
            cells = [shown(row, accounts[row.key]) for row in wanted]
            blocks.append(f"### {topology}, {chips} chips\n\n{tables.markdown(HEAD, cells)}")
    return "\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables to their place in docs/accelerators.md")
    parser.add_argument("--only", default="", help="rows whose key, RECIPE TOPOLOGY [CHANGE ...], matches this expression")
    parser.add_argument("--changed", action="store_true", help="compile rows again whose program or compiler has changed")
    parser.add_argument("--limit", type=float, default=1800, help="seconds to compile one row (1800); 0: none is compiled")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of accounts")
    arguments = parser.parse_args()
    for row in rows():
        if not arguments.limit or not re.search(arguments.only, row.key):
            continue
        account = records.read(arguments.results).get(row.key, {"error": "not compiled yet"})
        if "error" in account or (arguments.changed and changed(row, account)):
            account = compiled(row, arguments.limit)
            records.add(arguments.results, [account])
            print(" | ".join(shown(row, account)), flush=True)
    tables.publish(
        "accelerators", text(records.read(arguments.results)), str(tables.DOCS / "accelerators.md") if arguments.write else None
    )


if __name__ == "__main__":
    main()
