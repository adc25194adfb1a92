"""Settings of the whole suite: strict broadcasting, and a persistent compilation cache that halves the time of a second run."""

import pathlib

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"
cache.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
