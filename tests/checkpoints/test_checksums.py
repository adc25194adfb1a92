"""Laws of checksums: any one element that changes, or moves, changes them, and sharding does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deq_flax.checkpoints.stored_step import describe


@pytest.mark.parametrize("kind", ["crc32", "sum32"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint32, bool])
def test_one_element_changes_the_checksum(kind, dtype):
    x = np.asarray(jnp.arange(24).reshape(4, 6) % 2, dtype)
    same = describe(x.copy(), kind)
    assert describe(x, kind) == same and same["shape"] == [4, 6] and same["dtype"] == str(x.dtype)
    for index in ((0, 0), (1, 4), (3, 5)):
        changed = x.copy()
        changed[index] = 1 - changed[index]
        assert describe(changed, kind) != same
    assert describe(np.roll(x, 1), kind) != same


@pytest.mark.parametrize("kind", ["crc32", "sum32"])
def test_bits_count_and_not_values(kind):
    assert describe(np.float32([0.0]), kind) != describe(np.float32([-0.0]), kind)
    assert describe(np.float32([np.nan]), kind) == describe(np.float32([np.nan]), kind)


def test_the_sum_does_not_depend_on_sharding():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec in (PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec("a", "b")):
        assert describe(jax.device_put(x, NamedSharding(mesh, spec)), "sum32") == describe(x, "sum32")
