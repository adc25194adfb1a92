"""TPU chips and their topologies, for which programs are compiled without one."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from deq_flax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Published numbers of one device as JAX counts them; of v4 and 7x a device is one of a chip's two cores."""

    memory: float
    """Bytes of memory."""
    peak: float
    """Floating-point operations a second, bfloat16."""
    clock: float
    """Cycles a second."""
    product_rate: float
    """Operations a cycle of a large product of bfloat16 matrices, 8192^3, by the compiler's own estimate."""
    link: float
    """Bytes a second over one of its links to other chips, in one direction."""


CHIPS = {
    "v4": Chip(memory=16e9, peak=137.5e12, clock=1.05e9, product_rate=118_000, link=50e9),
    "v5e": Chip(memory=16e9, peak=197e12, clock=1.5e9, product_rate=115_000, link=50e9),
    "v5p": Chip(memory=95e9, peak=459e12, clock=1.75e9, product_rate=236_000, link=100e9),
    "v6e": Chip(memory=32e9, peak=918e12, clock=1.75e9, product_rate=369_000, link=100e9),
    "tpu7x": Chip(memory=96e9, peak=1153e12, clock=1.75e9, product_rate=422_000, link=100e9),
}

TOPOLOGIES = (
    *("v4:2x2x1", "v4:4x4x4"),
    *("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:4x4x4", "v5p:8x8x8"),
    *("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:16x16"),
    "tpu7x:2x2x1",
)
"""Topologies that are known to compile; others of the same chips may."""


_ACCELERATORS = {"v4": ("v4", 3), "v5litepod": ("v5e", 2), "v5p": ("v5p", 3), "v6e": ("v6e", 2)}
"""Accelerator types of Cloud TPU by their first part: the chip, and the number of axes of its topologies."""


def topology_of(accelerator: str) -> str:
    """Return the default topology of an accelerator type of Cloud TPU: 'v5e:4x4' for 'v5litepod-16'.

    Other names are returned unchanged. Its number counts chips; for v4 and v5p it counts cores, two to a chip.
    """
    kind, _, number = accelerator.partition("-")
    if kind not in _ACCELERATORS or not number.isdecimal() or not (count := int(number)) or count & (count - 1):
        return accelerator
    chip, axes = _ACCELERATORS[kind]
    doublings = int(math.log2(count // 2 if axes == 3 else count))
    if axes == 3 and doublings < 3:
        return f"{chip}:2x2x1"
    return f"{chip}:{'x'.join(str(2 ** ((doublings + i) // axes)) for i in range(axes))}"


def topology_devices(name: str) -> tuple[Chip, Sequence[Any]]:
    """Return the chip and the devices of a topology such as 'v5e:16x16', or of an accelerator type, for a mesh.

    From then on this process is one that compiles for chips that are not there: on the CPU, without a cache of programs.

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    name = topology_of(name)
    kind = name.split(":")[0]
    known = f"known: {', '.join(TOPOLOGIES)}"
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", name):
        raise UserError(f"no topology {name!r}; {known}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install -r requirements-tpu.txt")
    # libtpu reads these when it is loaded: it then looks for no TPU, and other processes may have it loaded too.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # without the chip, no program can be read from a cache again
    try:
        return CHIPS[kind], topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # its type depends on what is wrong
        raise UserError(f"no topology {name!r} ({' '.join(str(error).split())[:150]}); {known}") from error
