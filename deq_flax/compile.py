"""Compile a config's training and evaluation step ahead of time, for TPUs that are not there, and account for their cost.

  python -m deq_flax.compile --config wt103:base --topology v5e:16x16 [--config.mesh.fsdp=16] [--must_fit] [--json]

Needs neither data nor weights: shapes suffice. Memory, collectives and compile time are the program's own; cycles, and the
seconds and utilization made of them, are the compiler's estimates, not measurements. Without --topology the steps are compiled
for the devices of this machine, where the compiler estimates no cycles. A topology needs libtpu (requirements-tpu.txt). Without
--config, that of the run in --workdir is taken. Flags of deq_flax.main are accepted, so that a launch script can pass on those
of a run; of them --mode eval counts.
"""

import sys
from typing import Any

import jax
from absl import flags

from deq_flax import cli
from deq_flax.compilation import chips
from deq_flax.compilation.lower import compile_steps
from deq_flax.compilation.report import as_lines, cure, report
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
_MUST_FIT = flags.DEFINE_bool(
    "must_fit", False, "end with an error if a step does not fit into memory; implies --every_kind", flag_values=_FLAGS
)
_STEPS = flags.DEFINE_multi_enum("step", ["train", "eval"], ["train", "eval"], "step to compile", flag_values=_FLAGS)
_EVERY_KIND = flags.DEFINE_bool(
    "every_kind",
    False,
    "compile each kind of training step: those of pretraining and with the Jacobian loss too",
    flag_values=_FLAGS,
)
_CONFIG = cli.config_flag(_FLAGS)
OF_A_RUN = ("checkpoint", "coordinator", "num_processes", "patience", "process_id")
"""Flags of deq_flax.main that change nothing here."""
_MODE = flags.DEFINE_string("mode", "train", "as of deq_flax.main; eval: compile the evaluation step alone", flag_values=_FLAGS)
for _name in OF_A_RUN:
    flags.DEFINE_string(_name, None, "as of deq_flax.main; not used", flag_values=_FLAGS)


def main() -> dict[str, Any]:
    """Run the command; returns its result."""
    config = without_data(cli.resolved(_FLAGS))
    cli.require(not _MUST_FIT.value or _TOPOLOGY.value is not None, "--must_fit needs --topology, whose chips' memory is known")
    chip, devices = chips.topology_devices(_TOPOLOGY.value) if _TOPOLOGY.value else (None, jax.devices())
    result: dict[str, Any] = {"topology": _TOPOLOGY.value or jax.default_backend(), "devices": len(devices), "steps": {}}
    names = ["eval"] if _MODE.value == "eval" else _STEPS.value or ()
    print(f"compiling: {', '.join(names)}", file=sys.stderr, flush=True)
    for compiled in compile_steps(config, devices, names=names, every_kind=_EVERY_KIND.value or _MUST_FIT.value):
        name = compiled.step.name
        account = result["steps"][name] = report(compiled, chip, config.deq)
        for line in as_lines(name, account):
            print(line, flush=True)
        if _MUST_FIT.value and not account["fits"]:
            raise UserError(f"the {name} step does not fit: {cure(name, account)}")
    return result


if __name__ == "__main__":
    cli.run(main, of_run=("workdir", run_config), flag_values=_FLAGS)
