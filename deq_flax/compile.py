"""Compile a config's training and evaluation step ahead of time, for TPUs that are not there, and account for their cost.

  python -m deq_flax.compile --config wt103:base --topology v5e:16x16 [--config.mesh.fsdp=16] [--must_fit] [--json]

Needs neither data nor weights: shapes suffice. Memory, collectives and compile time are the program's own; cycles, and the
seconds and utilization made of them, are the compiler's estimates, not measurements. Without --topology the steps are compiled
for the devices of this machine, where the compiler estimates no cycles. A topology needs libtpu (requirements-tpu.txt). Without
--config, that of the run in --workdir is taken.
"""

import sys
from typing import Any

import jax
from absl import flags

from deq_flax import cli
from deq_flax.compilation import chips
from deq_flax.compilation.lower import compile_steps
from deq_flax.compilation.report import DOES_NOT_FIT, as_lines, report
from deq_flax.compilation.stand_in import without_data
from deq_flax.config_files import run_config
from deq_flax.errors import UserError

_FLAGS = flags.FlagValues()  # not the global ones, so that this module can be imported beside other commands
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    f"one of {', '.join(chips.TOPOLOGIES)}, or the like; or an accelerator type of Cloud TPU, such as v5litepod-16",
    flag_values=_FLAGS,
)
flags.DEFINE_string("workdir", None, "folder of a run, whose config is taken without --config", flag_values=_FLAGS)
_MUST_FIT = flags.DEFINE_bool("must_fit", False, "end with an error if a step does not fit into memory", flag_values=_FLAGS)
_STEPS = flags.DEFINE_multi_enum("step", ["train", "eval"], ["train", "eval"], "step to compile", flag_values=_FLAGS)
_JACOBIAN = flags.DEFINE_bool("jacobian_loss", False, "compile the training step with the Jacobian loss", flag_values=_FLAGS)

_CONFIG = cli.config_flag(_FLAGS)


def main() -> dict[str, Any]:
    """Run the command; returns its result."""
    config = without_data(cli.resolved(_FLAGS))
    chip, devices = chips.topology_devices(_TOPOLOGY.value) if _TOPOLOGY.value else (None, jax.devices())
    result: dict[str, Any] = {"topology": _TOPOLOGY.value or jax.default_backend(), "devices": len(devices), "steps": {}}
    names = _STEPS.value or ()
    print(f"compiling: {', '.join(names)}", file=sys.stderr, flush=True)
    for step in compile_steps(config, devices, names=names, jacobian_loss=_JACOBIAN.value):
        result["steps"][step.name] = report(step, chip, config.deq)
        for line in as_lines(step.name, result["steps"][step.name]):
            print(line, flush=True)
        if _MUST_FIT.value and not result["steps"][step.name].get("fits", True):
            raise UserError(f"the {step.name} step does not fit: {DOES_NOT_FIT}")
    return result


if __name__ == "__main__":
    cli.run(main, of_run=("workdir", run_config), flag_values=_FLAGS)
