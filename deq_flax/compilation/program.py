"""The cost of a compiled TPU program by the compiler's own account: cycles by part, and its largest operations.

The compiler writes an estimate of cycles beside most operations of its text. The body of a loop whose number of iterations
depends on data, such as a solver's, is a part of its own, and is counted once. Loops within it are counted with it, and all
other loops as often as they run. Of two branches of a conditional the cheaper counts, as in `operations.py`, but the dearer
where the program says that it is the usual one; of more than two the median.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from deq_flax.devices.collectives import Collective, add_collective, computations
from deq_flax.equilibrium.gradients.unroll import WITHIN_LIMIT

_INSTRUCTION = re.compile(r"  (?:ROOT )?(?P<name>%[\w.-]+) = (?P<rest>.*)")
_OPCODE = re.compile(r"(?:^|[)\}\]] )(?P<opcode>[a-z][\w-]*)\(%?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BODY = re.compile(r"body=(%[\w.-]+)")
_CONDITION = re.compile(r"condition=(%[\w.-]+)")
_BELOW = re.compile(r"  ROOT .* compare\(%[\w.-]+, (%[\w.-]+)\), direction=LT")
_CALLEES = re.compile(r"(?:to_apply|called_computations|calls)=\{?((?:%[\w.-]+(?:, )?)+)")
_BRANCHES = re.compile(r"(?:true_computation|false_computation|branch_computations)=\{?((?:%[\w.-]+(?:, )?)+)")


@dataclass(frozen=True)
class Operation:
    """An operation of a program."""

    cycles: float
    """Estimated cycles, times the iterations of loops around it whose number is known."""
    opcode: str
    op_name: str
    """Name of the operation in the program, such as 'jit(step)/shard_map/jvp()/while/body/dot_general'."""
    line: str
    """FILE:LINE of the package's code that it comes from; '' if there is none."""


@dataclass
class Part:
    """A part of a program: an iteration of a loop, or everything outside of loops."""

    name: str
    """'forward iteration', 'adjoint iteration', 'outside', or the op_name of another loop."""
    operations: list[Operation] = field(default_factory=list)
    sent: dict[float, list[Collective]] = field(default_factory=dict)
    """Collectives, by the iterations of loops around them whose number is known."""

    @property
    def cycles(self) -> float:
        """Estimated cycles of one iteration, or of everything outside."""
        return sum(operation.cycles for operation in self.operations)

    def largest(self, count: int = 10) -> list[Operation]:
        """Return the operations with the most cycles."""
        return sorted(self.operations, key=lambda operation: -operation.cycles)[:count]


def parts_of(hlo: str) -> list[Part]:
    """Return the parts of a program from `compiled.as_text()`, 'outside' first. Iterations of one name are added up."""
    program = _Program(hlo)
    parts: dict[str, Part] = {"outside": Part("outside")}
    program.collect(program.entry, parts, "outside", 1.0)
    return [*parts.values()]


def loop_name(op_name: str) -> str:
    """Name a loop by the op_name of its `while`: of a differentiated program the outermost of unknown length is a solver's."""
    if "while" not in op_name:
        return op_name
    return "adjoint iteration" if "transpose(" in op_name else "forward iteration"


def is_usual(op_name: str) -> bool:
    """Whether the dearer branch of a conditional is the usual one: a step of an unrolled iteration within its limit."""
    return WITHIN_LIMIT in op_name


class _Program:
    """The text of a program, by computation."""

    def __init__(self, hlo: str):
        self.lines, self.entry = computations(hlo)
        self._locations = _source_lines(hlo)

    def collect(self, computation: str, parts: dict[str, Part], part: str, times: float) -> None:
        """Add the operations of a computation, and of those it calls, to the parts."""
        sent = parts[part].sent.setdefault(times, [])
        for line in self.lines.get(computation, ()):
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            rest = instruction["rest"]
            found, op_name = _OPCODE.search(rest), _first(_SOURCE, rest)
            opcode = found["opcode"] if found else ""
            if opcode == "while":
                trips, body = self._trips(rest), _first(_BODY, rest)
                if trips or part != "outside":
                    self.collect(body, parts, part, times * (trips or 1))
                else:
                    name = loop_name(op_name)
                    self.collect(body, parts, parts.setdefault(name, Part(name)).name, times)
            elif opcode in ("call", "async-start"):
                for callee in _named(_CALLEES, rest):
                    self.collect(callee, parts, part, times)
            elif opcode == "conditional":
                self._collect_branch(_named(_BRANCHES, rest), parts, part, times, usual=is_usual(op_name))
            elif opcode == "fusion":
                for callee in _named(_CALLEES, rest):
                    for inner in self.lines.get(callee, ()):
                        add_collective(sent, callee, inner)
            add_collective(sent, computation, line)
            cycles = _first(_CYCLES, rest)
            if cycles:
                operation = Operation(times * int(cycles), opcode, op_name, self._line(rest))
                parts[part].operations.append(operation)

    def _collect_branch(self, branches: list[str], parts: dict[str, Part], part: str, times: float, *, usual: bool) -> None:
        """Add the cheaper of two branches, or the dearer if it is the `usual` one; of more than two the median one.

        More than two read as much of a solver's history as is filled.
        """
        found = []
        for branch in branches:
            found.append({part: Part(part)})
            self.collect(branch, found[-1], part, times)
        found.sort(key=lambda own: sum(one.cycles for one in own.values()))
        which = -1 if usual else len(found) // 2 if len(found) > 2 else 0
        for name, one in found[which].items() if found else ():
            into = parts.setdefault(name, Part(name))
            into.operations.extend(one.operations)
            for n, sent in one.sent.items():
                into.sent.setdefault(n, []).extend(sent)

    def _trips(self, rest: str) -> int:
        """Number of iterations of a loop; 0 where it depends on data.

        JAX's scans count from 0 to below a constant, and loops of the compiler's own do so with an unsigned number.
        """
        if known := _first(_TRIPS, rest):
            return int(known)
        lines = self.lines.get(_first(_CONDITION, rest), [])
        bound = next((found[1] for found in map(_BELOW.match, lines) if found), "")
        constants = (re.match(rf"  {re.escape(bound)} = [su]32\[\]\S* constant\((\d+)\)", line) for line in lines)
        return next((int(found[1]) for found in constants if found), 0) if bound else 0

    def _line(self, rest: str) -> str:
        frame = _first(_FRAME, rest)
        return self._locations.get(int(frame), "") if frame else ""


def _named(pattern: re.Pattern[str], text: str) -> list[str]:
    return [name for group in pattern.findall(text) for name in group.split(", ")]


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _source_lines(hlo: str) -> dict[int, str]:
    """FILE:LINE for each stack frame: the innermost line in this package, outside of its solvers' generic loop if possible."""
    tables = {name: dict(_table(hlo, name)) for name in ("FileNames", "FileLocations", "StackFrames")}
    files = {key: text.strip('"') for key, text in tables["FileNames"].items()}
    places = {}
    for key, text in tables["FileLocations"].items():
        fields = dict(re.findall(r"(\w+)=(\d+)", text))
        places[key] = files.get(int(fields.get("file_name_id", 0)), ""), fields.get("line", "0")
    frames = {key: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", text)} for key, text in tables["StackFrames"].items()}
    found = {}
    for key in frames:
        at, seen = key, set()
        while at in frames and at not in seen:
            seen.add(at)
            file, line = places.get(frames[at].get("file_location_id", 0), ("", "0"))
            if "/deq_flax/" in file and "/compilation/" not in file:
                found[key] = f"{file.rsplit('/deq_flax/', 1)[1]}:{line}"
                break
            at = frames[at].get("parent_frame_id", 0)
    return found


def _table(hlo: str, name: str) -> Iterator[tuple[int, str]]:
    """The numbered lines below a heading."""
    section = hlo.partition(f"\n{name}\n")[2]
    for line in section.splitlines():
        number, _, text = line.partition(" ")
        if not number.isdigit():
            return
        yield int(number), text
