"""The account of a compiled step: memory, collectives, cycles by part, and its largest operations."""

from collections.abc import Iterator
from typing import Any

from deq_flax.compilation.chips import Chip
from deq_flax.compilation.lower import CompiledStep
from deq_flax.compilation.operations import operations_by_part
from deq_flax.compilation.program import parts_of
from deq_flax.devices.collectives import Collective, collectives, table
from deq_flax.train.phases import DEQOptions

LARGEST = 10
"""Operations that are listed for each part."""
DOES_NOT_FIT = (
    "set mesh.fsdp to split what is stored, lower data.batch_size, raise train.accumulate, or set memory=10 in "
    "deq.solver_options and deq.backward_solver_options"
)
"""Advice for a step that needs more memory than there is."""


def report(step: CompiledStep, chip: Chip | None, deq: DEQOptions | None) -> dict[str, Any]:
    """Return the account of a step as plain data.

    Args:
      step: the compiled step.
      chip: the chip it is compiled for; None for devices of this machine, whose compiler estimates no cycles.
      deq: section `deq` of the config, for its limits on iterations; None without an equilibrium.
    """
    if step.compiled is None:
        held = step.kept | {"temporary": step.refused}
        held["all"] = sum(held.values())
        account: dict[str, Any] = {"compile_seconds": step.seconds, "bytes": held, "collectives": {}, "fits": False}
        return account | ({"memory": chip.memory} if chip else {})
    hlo, memory = step.compiled.as_text() or "", step.compiled.memory_analysis()
    assert memory is not None, "the compilers for CPU, GPU and TPU tell"
    found = collectives(hlo)
    bytes_ = step.kept | {"temporary": memory.temp_size_in_bytes, "program": memory.generated_code_size_in_bytes}
    # Donated state is both argument and result.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    bytes_["all"] = total + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    result: dict[str, Any] = {
        "compile_seconds": step.seconds,
        "bytes": bytes_,
        "aliased": memory.alias_size_in_bytes,
        "collectives": {
            where: {kind: {"count": n, "bytes": size} for kind, (n, size) in table(these).items()}
            for where, these in (
                ("in_loops", [c for c in found if c.in_loop]),
                ("outside", [c for c in found if not c.in_loop]),
            )
        },
    }
    if chip is None:
        return result
    result |= {"memory": chip.memory, "fits": bytes_["all"] <= chip.memory}
    products, parts, iterations = operations_by_part(step.jaxpr), {}, _iterations(step.name, deq)
    step_cycles = useful = 0.0
    for part in parts_of(hlo):
        times = iterations.get(part.name, 1)
        flops = products.get(part.name, 0.0) / step.shards
        step_cycles, useful = step_cycles + times * part.cycles, useful + times * flops
        parts[part.name] = {
            "cycles": part.cycles,
            "seconds": part.cycles / chip.clock,
            "iterations": times,
            "product_cycles": flops / chip.product_rate,
            "largest": [
                {"cycles": o.cycles, "opcode": o.opcode, "line": o.line, "op_name": o.op_name} for o in part.largest(LARGEST)
            ],
        }
    sending = sum(_seconds_sending(c, chip) for c in found if not c.in_loop)
    seconds = step_cycles / chip.clock + sending
    utilization = useful / seconds / chip.peak if seconds else 0.0
    return result | {"parts": parts, "sending": sending, "seconds": seconds, "utilization": utilization}


def _seconds_sending(collective: Collective, chip: Chip) -> float:
    """Seconds of a collective in a ring along one axis of the torus, in both directions: the compiler estimates none."""
    return collective.bytes * (2 if collective.kind == "all-reduce" else 1) / (2 * chip.link)


def as_lines(name: str, account: dict[str, Any]) -> Iterator[str]:
    """The account as text for people."""
    held = account["bytes"]
    yield f"{name} step, compiled in {account['compile_seconds']:.0f} s"
    kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in held.items() if kind != "all" and size)
    of = f" of {_size(account['memory'])}" if "memory" in account else ""
    yield f"  memory a device: {_size(held['all'])}{of} ({kinds})"
    if not account.get("fits", True):
        yield f"  does not fit: {DOES_NOT_FIT}"
    for where, kinds in account["collectives"].items():
        listed = ", ".join(f"{n['count']} {kind} of {_size(n['bytes'])}" for kind, n in kinds.items())
        yield f"  collectives {where.replace('_', ' ')}: {listed or 'none'}"
    if "parts" not in account:
        return
    sending = f", {1e3 * account['sending']:.1f} of them for collectives outside of loops"
    yield f"  estimated: {1e3 * account['seconds']:.1f} ms a step{sending}; {account['utilization']:.0%} of the peak"
    for part, costs in account["parts"].items():
        times = f" x {costs['iterations']}" if costs["iterations"] > 1 else ""
        products = costs["product_cycles"]
        ratio = f", {costs['cycles'] / products:.2f} times its products at the rate of a large one" if products else ""
        yield f"  {part}{times}: {costs['cycles']:,.0f} cycles, {1e3 * costs['seconds']:.3f} ms{ratio}"
        for operation in costs["largest"]:
            where = f"{operation['opcode']:<12} {operation['line']:<42} {operation['op_name'][-60:]}"
            yield f"    {operation['cycles']:>12,.0f} {where}"


def _iterations(step: str, deq: DEQOptions | None) -> dict[str, int]:
    """Iterations of a step at its limits."""
    if deq is None:
        return {}
    forward = deq.max_steps if step == "train" else deq.eval_max_steps or deq.max_steps
    return {"forward iteration": forward, "adjoint iteration": deq.backward_max_steps}


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
