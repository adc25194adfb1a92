"""Memory and communication of meshes, on eight devices of this host.

    python -m benchmarks.scaling

Of a small model: communication does not depend on the solver's iterations, and the bytes stored on a device fall with `fsdp`.
What pods of TPUs make of a step: docs/accelerators.md.
"""

import argparse
import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # these programs are analyzed, hardly run

import jax
import numpy as np

from benchmarks import training
from deq_flax.config import make_task, phases_of
from deq_flax.devices.collectives import collectives, table
from deq_flax.devices.mesh import MeshOptions, make_mesh
from deq_flax.train.loop import Run

MESHES = ((8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 1, 4))
LIMITS = (4, 16)


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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
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


if __name__ == "__main__":
    main()
