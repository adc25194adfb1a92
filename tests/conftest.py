"""Settings of the whole suite: strict broadcasting, eight devices, and short compilation.

Programs here run for milliseconds and compile for seconds, so the CPU code generator does not optimize (XLA's own passes do),
and a persistent cache halves the time of a second run.
"""

import gc
import importlib.metadata
import os
from pathlib import Path

# jax 0.10 still has the older code generator, which compiles twice as fast.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_parallel_codegen_split_count=1"  # to split a program costs more than two cores gain from it
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import jax
import pytest

from tests.commands import CACHE

gc.set_threshold(200_000, 20, 100)  # tracing makes many objects that stay: collecting at every 700 takes a sixth of the time
jax.config.update("jax_num_cpu_devices", 8)  # for the tests of sharding; the others use the first
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


MAPS = Path("/proc/self/maps")
"""The memory maps of this process, of which Linux allows 65,530; its file is there on Linux only."""


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Drop the compiled programs of earlier modules before their memory maps run out.

    A program has four to ten maps. In a process of thousands of programs the one for which none is left ends it with a
    segmentation fault.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
