"""A small run's checkpoints, and ways to damage them, for the tests of this folder."""

import logging
import shutil

import jax
import jax.numpy as jnp

from deq_flax.checkpoints.checkpoints import CheckpointOptions, Checkpoints

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the failures that these tests provoke

TEMPLATE = {"w": jax.ShapeDtypeStruct((30, 40), jnp.float32)}


def opened(folder, keep_latest=3, keep_best=1):
    return Checkpoints(folder, CheckpointOptions(keep_latest=keep_latest, keep_best=keep_best))


def save(checkpoints, step, params=None, loss=None, **options):
    metrics = None if loss is None else {"loss": loss}
    params = {"w": jnp.zeros((30, 40))} if params is None else params
    return checkpoints.save(step, params=params, **{"rest": {}, "meta": {}, "metrics": metrics} | options)


def save_three(workdir):
    """Checkpoints at 1, 2, 3 of which 2 is the best, each with other weights."""
    w = jax.random.normal(jax.random.key(0), (30, 40))
    with opened(workdir / "checkpoints") as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            save(checkpoints, step, {"w": w + step}, loss, meta={"config": {"model": {"cutoffs": (1, 2)}}})
    return workdir


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(folder, how):
    """Damage one checkpoint."""
    if how == "empty":
        for path in files_of(folder):
            path.unlink()
    elif how == "truncated":
        for path in files_of(folder / "params"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "flipped":
        path = max(files_of(folder / "params"), key=lambda path: path.stat().st_size)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif how == "meta":
        path = folder / "meta" / "metadata"
        path.write_text(path.read_text().replace('"config"', '"konfig"'))
    elif how == "item":
        shutil.rmtree(folder / "params")
    elif how == "swapped":
        shutil.rmtree(folder / "params")
        shutil.copytree(folder.with_name("2") / "params", folder / "params")
