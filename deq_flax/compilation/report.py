"""The account of a compiled step: memory, collectives, cycles by part, and its largest operations."""

from collections.abc import Iterator
from typing import Any

from deq_flax.compilation.chips import Chip
from deq_flax.compilation.lower import CompiledStep
from deq_flax.compilation.operations import operations_by_part
from deq_flax.compilation.program import Part, parts_of
from deq_flax.devices.collectives import collectives, table
from deq_flax.equilibrium import Unroll
from deq_flax.train.phases import DEQOptions

LARGEST = 10
"""Operations that are listed for each part."""


def cure(name: str, account: dict[str, Any]) -> str:
    """Return advice for a step that needs more memory than there is: to split what it stores, or to compute less at once."""
    held = account["bytes"]
    if name == "eval":  # its parameters are whole, but for what `tensor` splits
        split, smaller = "set mesh.tensor to split the parameters", "lower data.eval_batch_size"
    else:
        split = "set mesh.fsdp to split what is stored"
        histories = "set memory=10 in deq.solver_options and deq.backward_solver_options"
        smaller = f"lower data.batch_size, raise train.accumulate, or {histories}"
    stored = sum(held.get(kind, 0) for kind in ("parameters", "optimizer"))
    return f"{split}; or {smaller}" if 2 * stored > held["all"] else f"{smaller}; or {split}"


def report(compiled: CompiledStep, chip: Chip | None, deq: DEQOptions | None) -> dict[str, Any]:
    """Return the account of a step as plain data.

    Args:
      compiled: the compiled step.
      chip: the chip it is compiled for; None for devices of this machine, whose compiler estimates no cycles.
      deq: section `deq` of the config, for its limits on iterations; None without an equilibrium.
    """
    step = compiled.step
    head = {"program": step.fingerprint, "compile_seconds": compiled.seconds}
    if compiled.compiled is None:
        held = step.kept | {"temporary": compiled.refused}
        held["all"] = sum(held.values())
        return head | {"bytes": held, "collectives": {}, "fits": False} | ({"memory": chip.memory} if chip else {})
    hlo, memory = compiled.compiled.as_text() or "", compiled.compiled.memory_analysis()
    assert memory is not None, "the compilers for CPU, GPU and TPU tell"
    found = collectives(hlo)
    bytes_ = step.kept | {"temporary": memory.temp_size_in_bytes, "program": memory.generated_code_size_in_bytes}
    # Donated state is both argument and result.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    bytes_["all"] = total + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    result: dict[str, Any] = head | {
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
    step_cycles = useful = sending = 0.0
    for part in parts_of(hlo):
        times = iterations.get(part.name, 1)
        flops = products.get(part.name, 0.0) / step.shards
        step_cycles, useful = step_cycles + times * part.cycles, useful + times * flops
        sending += times * _seconds_sending(part, chip)
        parts[part.name] = {
            "cycles": part.cycles,
            "seconds": part.cycles / chip.clock,
            "iterations": times,
            "product_cycles": flops / chip.product_rate,
            "largest": [
                {"cycles": o.cycles, "opcode": o.opcode, "line": o.line, "op_name": o.op_name} for o in part.largest(LARGEST)
            ],
        }
    seconds = step_cycles / chip.clock + sending
    utilization = useful / seconds / chip.peak if seconds else 0.0
    return result | {"parts": parts, "sending": sending, "seconds": seconds, "utilization": utilization}


def _seconds_sending(part: Part, chip: Chip) -> float:
    """Seconds of a part's collectives, one after the other, each in a ring along one axis of the torus in both directions.

    The compiler estimates none.
    """
    sent = sum(n * c.bytes * (2 if c.kind == "all-reduce" else 1) for n, found in part.sent.items() for c in found)
    return sent / (2 * chip.link)


def as_lines(name: str, account: dict[str, Any]) -> Iterator[str]:
    """The account as text for people."""
    held = account["bytes"]
    yield f"{name} step, compiled in {account['compile_seconds']:.0f} s"
    kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in held.items() if kind != "all" and size)
    of = f" of {_size(account['memory'])}" if "memory" in account else ""
    yield f"  memory a device: {_size(held['all'])}{of} ({kinds})"
    if not account.get("fits", True):
        yield f"  does not fit: {cure(name, account)}"
    for where, kinds in account["collectives"].items():
        listed = ", ".join(f"{n['count']} {kind} of {_size(n['bytes'])}" for kind, n in kinds.items())
        yield f"  collectives {where.replace('_', ' ')}: {listed or 'none'}"
    if "parts" not in account:
        return
    sending = f", {1e3 * account['sending']:.1f} of them for collectives"
    peak = f"{account['utilization']:.0%} of the peak"
    yield f"  estimates: {1e3 * account['seconds']:.1f} ms a step at its limits on iterations{sending}; {peak}"
    for part, costs in account["parts"].items():
        times = f" x {costs['iterations']}" if costs["iterations"] != 1 else ""
        products = costs["product_cycles"]
        ratio = f", {costs['cycles'] / products:.2f} times its products at the rate of a large one" if products else ""
        yield f"    {part}{times}: {costs['cycles']:,.0f} cycles, {1e3 * costs['seconds']:.3f} ms{ratio}"
        for operation in costs["largest"]:
            where = f"{operation['opcode']:<12} {operation['line']:<42} {operation['op_name'][-60:]}"
            yield f"      {operation['cycles']:>12,.0f} {where}"


def _iterations(step: str, deq: DEQOptions | None) -> dict[str, int]:
    """Iterations of a step at its limits. Of an unrolled iteration only the free ones are in a loop of unknown length."""
    if deq is None:
        return {}
    evaluated = step == "eval"
    forward = (deq.evaluation_solver() if evaluated else deq.forward_solver()).max_steps
    gradient = deq.evaluation_gradient() if evaluated else deq.training_gradient()
    if isinstance(gradient, Unroll):
        forward = gradient.steps - (gradient.last or gradient.steps)
    return {"forward iteration": forward, "adjoint iteration": deq.backward_max_steps}


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
