"""Memory and communication of meshes, and a model of the time of a step on pods of 8 to 512 chips.

    python -m benchmarks.scaling [--config configs/wt103.py] [--seconds S] [--chip v5e|h100] [--batch 7]

The first two tables are of a small model on 8 host devices: communication does not depend on the solver's iterations, and the
bytes stored on a device fall with `fsdp`. The third is a model, not a measurement: a step on one chip takes --seconds
(measured there, at --batch sequences a chip), and a pod adds the time to gather parameters and to reduce gradients over its
links, without overlap with the solve.
"""

import argparse
import math
import os
from dataclasses import dataclass, replace

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # these programs are analyzed, hardly run

import jax
import numpy as np
from flax import nnx

from benchmarks import training
from deq_flax.config import make_task, phases_of
from deq_flax.devices.collectives import collectives, table
from deq_flax.devices.mesh import MeshOptions, make_mesh
from deq_flax.models import abstract_model
from deq_flax.train.loop import Run

MESHES = ((8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 1, 4))
LIMITS = (4, 16)


@dataclass(frozen=True)
class Chip:
    """Published speeds of the links of one chip, in one direction, along the axis that a ring uses."""

    name: str
    link: float
    """Bytes a second within a slice or node."""
    per_node: int
    """Number of chips that these links connect."""
    between: float
    """Bytes a second and chip between slices or nodes."""


CHIPS = {
    "v5e": Chip("TPU v5e: 45 GB/s a link and direction, 256 chips a slice, 3 GB/s a chip beyond", 45e9, 256, 3e9),
    "h100": Chip("H100: NVLink 450 GB/s in a node of 8, 50 GB/s a GPU beyond", 450e9, 8, 50e9),
}


def run_on(mesh: tuple[int, int, int], limit: int):
    """A run of a small model on a mesh (data, fsdp, tensor), with at most `limit` evaluations each way."""
    changes = {
        "model.d_model": 64, "model.d_embed": 64, "model.n_head": 4, "model.d_head": 16, "model.d_inner": 512,
        "data.seq_len": 8, "model.mem_len": 8, "deq.max_steps": limit, "deq.backward_max_steps": limit,
        "deq.max_steps_jitter": 0, "deq.pretrain_steps": 0, "deq.jacobian_weight": 0.0,
    }  # fmt: skip
    c = training.resolved("configs/wt103.py:tiny", changes)
    devices = make_mesh(MeshOptions(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]))
    return Run(make_task(c), phases_of(c), c.train, devices, c.optimizer)


def measure(mesh: tuple[int, int, int], limit: int) -> tuple[list, int, int]:
    """(collectives of a step, bytes of parameters, bytes of optimizer state on one device)."""
    run = run_on(mesh, limit)
    arguments = (run.state, jax.device_put(next(run.task.train_batches(0))), run.phases.scalars(0), np.int32(0))
    hlo = run.train_step.lower(*arguments, phase=run.phases.phase(0)).compile().as_text()
    stored = [
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        for tree in (run.state.params, run.state.opt_state)
    ]
    return collectives(hlo), *stored


def seconds_sending(chips: int, parameters: int, chip: Chip) -> float:
    """Seconds to gather float32 parameters and to reduce-scatter gradients once: rings within a node, then between nodes."""
    part = (chips - 1) / chips * 4 * parameters
    inside = min(chips, chip.per_node)
    within = 2 * (inside - 1) / inside * 4 * parameters / chip.link
    # Beyond a node each chip sends the part of the parameters that it holds of its node.
    return within + (2 * part / inside / chip.between if chips > chip.per_node else 0.0)


def parameters_of(path: str) -> int:
    options = training.resolved(path).model
    model = abstract_model(replace(options, vocab_size=options.vocab_size or 267_735))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/wt103.py")
    parser.add_argument("--seconds", type=float, help="measured time of a step on one chip; no third table without it")
    parser.add_argument("--batch", type=int, default=7, help="sequences a chip in that measurement")
    parser.add_argument("--chip", choices=CHIPS, default="h100")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)

    print("| data x fsdp x tensor | evaluations at most | in loops | all-gather | reduce-scatter | all-reduce |")
    print("|---|---|---|---|---|---|")
    rows = []
    for mesh in MESHES:
        for limit in LIMITS:
            found, params, opt = measure(mesh, limit)
            sent = table([c for c in found if not c.in_loop])
            kinds = [sent.get(kind, (0, 0)) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
            looped = ", ".join(f"{n} {kind} of {size} B" for kind, (n, size) in table([c for c in found if c.in_loop]).items())
            cells = " | ".join(f"{count}: {size:,} B" for count, size in kinds)
            print(f"| {' x '.join(map(str, mesh))} | {limit} | {looped or 'nothing'} | {cells} |", flush=True)
        rows.append((mesh, params, opt))
    print("\n| data x fsdp x tensor | bytes of parameters a device | of optimizer state |\n|---|---|---|")
    for mesh, params, opt in rows:
        print(f"| {' x '.join(map(str, mesh))} | {params:,} | {opt:,} |")
    if options.seconds:
        count, chip = parameters_of(options.config), CHIPS[options.chip]
        print(f"\n{options.config}: {count / 1e6:.0f}M parameters, {options.seconds} s a step on one chip. {chip.name}.\n")
        print("| chips | sequences a step | sending, s | step, s | efficiency |\n|---|---|---|---|---|")
        for chips in (1, 8, 16, 32, 64, 128, 256, 512):
            sending = seconds_sending(chips, count, chip)
            step = options.seconds + sending
            print(f"| {chips} | {chips * options.batch} | {sending:.4f} | {step:.3f} | {options.seconds / step:.1%} |")


if __name__ == "__main__":
    main()
