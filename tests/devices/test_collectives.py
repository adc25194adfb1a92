"""Laws of reading HLO: a collective is listed with its bytes and whether it is within a loop; a single device has none."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from deq_flax.devices.collectives import Collective, collectives, table
from deq_flax.devices.mesh import MeshOptions, make_mesh


def program(steps, **sizes):
    mesh = make_mesh(MeshOptions(**{"data": 1} | sizes))

    def local(x):
        looped = jax.lax.fori_loop(0, steps, lambda _, y: jax.lax.psum(y, "data") / 2, x)
        return jax.lax.all_gather(looped, "data", tiled=True)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    return collectives(jax.jit(sharded).lower(jnp.zeros((8, 16))).compile().as_text())


def test_kind_bytes_and_place():
    found = program(3, data=2)
    assert Collective(kind="all-reduce", bytes=4 * 16 * 4, in_loop=True) in found
    assert Collective(kind="all-gather", bytes=8 * 16 * 4, in_loop=False) in found
    assert table(found) == {"all-gather": (1, 512), "all-reduce": (1, 256)}


def test_one_device_has_no_collectives():
    assert program(3) == []
