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


TPU = """
%begins (p: f32[1,4]) -> (f32[1,4], f32[8,4]) {
  %all-gather.1 = f32[8,4]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="1"}
  ROOT %call = (f32[1,4], f32[8,4]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%ends (p: f32[1,4]) -> f32[8,4] {
  %all-gather.2 = f32[8,4]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="1"}
}

%all-reduce-scatter.3 (p: f32[14,4]) -> f32[2,4] {
  %all-reduce.1 = f32[16,4]{1,0} all-reduce(%pad), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
}

ENTRY %main (p: f32[1,4]) -> f32[8,4] {
  %all-gather-start = (f32[1,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}
  %all-gather-done = f32[8,4]{1,0} all-gather-done(%all-gather-start)
  %collective-permute-start = (f32[1,4], f32[1,4], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
}
"""


def test_what_a_tpu_does_in_parts_or_under_another_name_is_one_collective():
    assert table(collectives(TPU)) == {
        "all-gather": (2, 2 * 8 * 4 * 4),
        "reduce-scatter": (1, 16 * 4 * 4),
        "collective-permute": (1, 4 * 4),
    }


def test_one_device_has_no_collectives():
    assert program(3) == []
