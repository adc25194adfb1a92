"""The collectives of a compiled program, read from its HLO text: their kinds, bytes and loops."""

import math
import re
from collections import Counter
from dataclasses import dataclass

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s8": 8, "u8": 8, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
_HEAD = re.compile(r"(?P<entry>ENTRY )?(?P<name>%[\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"  (?:ROOT )?%[\w.-]+ = (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)\}?")


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str
    bytes: int
    """Size of its result on a device; for a reduce-scatter, of its operand."""
    in_loop: bool = False
    """True if it is in the body or condition of a while loop."""
    chain: str = ""
    """Name of one that is fused with other work and stands in the text where it begins, goes on and ends; else ''."""


def collectives(hlo: str) -> list[Collective]:
    """The collectives in `compiled.as_text()`, without those of a single device."""
    lines_of, _ = computations(hlo)
    looped = _reachable_from_loops(lines_of)
    found: list[Collective] = []
    for name, lines in lines_of.items():
        for line in lines:
            add_collective(found, name, line, in_loop=name in looped)
    return found


def add_collective(found: list[Collective], computation: str, line: str, *, in_loop: bool = False) -> None:
    """Add the collective that a line of a computation is, if it is one and `found` does not have its chain yet."""
    match = _COLLECTIVE.match(line)
    if match is None:
        return
    group, chain = _group_size(match["rest"]), _CHAIN.search(line)
    if group == 1 or (chain and any(chain[1] == other.chain for other in found)):
        return
    kind, sizes = match["kind"], _sizes(match["shape"])
    size = sum(sizes)
    if kind == "all-gather" and match["start"]:  # (operands, results)
        size = size * group // (group + 1)
    elif kind == "collective-permute" and match["start"]:  # (operand, result, two numbers)
        size = sizes[1]
    elif kind == "reduce-scatter":
        size *= group
    elif computation.startswith("%all-reduce-scatter"):  # a reduce-scatter, in TPU's programs
        kind = "reduce-scatter"
    found.append(Collective(kind=kind, bytes=size, in_loop=in_loop, chain=chain[1] if chain else ""))


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of a program's text by computation, and the name of the first computation to run."""
    found: dict[str, list[str]] = {}
    lines, entry = [], ""
    for line in hlo.splitlines():
        head = _HEAD.match(line)
        if head:
            lines = found.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif line.startswith("  "):
            lines.append(line)
    return found, entry


def table(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """Sum up collectives by kind: {kind: (number, bytes in total)}."""
    count, size = Counter(), Counter()
    for collective in found:
        count[collective.kind] += 1
        size[collective.kind] += collective.bytes
    return {kind: (count[kind], size[kind]) for kind in KINDS if count[kind]}


def _reachable_from_loops(lines_of: dict[str, list[str]]) -> set[str]:
    calls = {
        name: [c for line in lines for group in _CALLED.findall(line) for c in group.split(", ")]
        for name, lines in lines_of.items()
    }
    todo = [
        c for lines in lines_of.values() for line in lines if " while(" in line
        for group in _CALLED.findall(line) for c in group.split(", ")
    ]  # fmt: skip
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += calls.get(name, [])
    return reached


def _sizes(shape: str) -> list[int]:
    """Bytes of each array of a shape."""
    return [
        _BITS.get(kind, 32) // 8 * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]


def _group_size(rest: str) -> int:
    """Devices in one group, from any of XLA's three notations; 0 where none is given, as for a permutation."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return listed[1].count(",") + 1
    named = re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", rest)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"('\w+')=(\d+)", named[1])}
        return math.prod(
            int(part) if part else sizes[axis] for axis, part in re.findall(r"('\w+')(?::\(\d+\)(\d+))?", named[2])
        )
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    return int(iota[1]) if iota else 0
