"""Laws of meshes: options become a mesh of the available devices, or an error that names possible values."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deq_flax.devices import mesh as mesh_module
from deq_flax.devices.mesh import (
    MeshOptions,
    by_batch,
    check_batch,
    compiler_options,
    local_rows,
    make_mesh,
    own_contractions,
    place,
    put_batch,
    replicated,
)
from deq_flax.errors import UserError


def options(data, fsdp, tensor):
    return MeshOptions(data=data, fsdp=fsdp, tensor=tensor)


def test_the_default_splits_the_batch_over_all_devices():
    assert dict(make_mesh(MeshOptions()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 2, 2), (2, 2, 2)), ((2, -1, 1), (2, 4, 1)), ((1, 1, 1), (1, 1, 1)), ((-1, 1, 1), (8, 1, 1)), ((1, 2, 3), (1, 2, 3))],
)
def test_minus_one_stands_for_the_remaining_devices(sizes, shape):
    assert tuple(make_mesh(options(*sizes)).shape.values()) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, -1, 1), "one of them -1"),
        ((0, 1, 1), "at least 1"),
        ((1, -2, 1), "at least 1"),
        ((-1, 3, 1), "8 devices cannot be divided by mesh.fsdp 3"),
        ((4, 4, 1), "takes 16 devices, and there are 8"),
    ],
)
def test_an_impossible_mesh_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(options(*sizes))


def test_several_processes_take_all_devices(monkeypatch):
    monkeypatch.setattr(mesh_module.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="takes 4 of 8 devices"):
        make_mesh(options(2, 2, 1))


def test_a_batch_that_cannot_be_split_is_refused_with_sizes_that_can():
    mesh = make_mesh(options(2, 2, 2))
    check_batch(mesh, batch_size=8, accumulate=2, eval_batch_size=4)
    with pytest.raises(UserError, match=r"batch_size 20 must be a multiple of .* = 4 x 2: set it to 16 or to 24"):
        check_batch(mesh, batch_size=20, accumulate=2, eval_batch_size=4)
    with pytest.raises(UserError, match=r"eval_batch_size 2 must be a multiple of .* = 4: set it to 4 or to 8"):
        check_batch(mesh, batch_size=8, accumulate=1, eval_batch_size=2)
    with pytest.raises(UserError, match=r"train.accumulate must be at least 1"):
        check_batch(mesh, batch_size=8, accumulate=0, eval_batch_size=4)


def test_a_batch_is_split_by_rows_and_other_arrays_are_replicated():
    mesh = make_mesh(options(2, 2, 2))
    assert local_rows(mesh, 8) is None  # one process reads them all
    batch = put_batch(mesh, {"x": np.arange(24).reshape(8, 3)}, 8)["x"]
    assert batch.sharding == by_batch(mesh) and {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    whole = place(np.arange(3), replicated(mesh))
    assert whole.is_fully_replicated and len(whole.sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, (batch, whole), (np.arange(24).reshape(8, 3), np.arange(3)))


@pytest.mark.parametrize(
    ("kind", "given"), [("NVIDIA H200", False), ("TPU v5 lite", True), ("TPU v5", True), ("TPU v6 lite", False)]
)
def test_only_the_accelerators_that_need_it_get_an_option(kind, given):
    mesh = SimpleNamespace(devices=np.array([[[SimpleNamespace(device_kind=kind)]]]))
    assert (compiler_options(mesh) is not None) == given  # an option that a device does not know would be an error


def test_on_a_cpu_xla_convolves_itself():
    def compiled(chosen):
        convolve = partial(jax.lax.conv, window_strides=(1, 1), padding="SAME")
        return jax.jit(convolve, compiler_options=chosen).lower(np.ones((2, 64, 4, 4)), np.ones((64, 64, 3, 3))).compile()

    assert "ynn" in compiled(None).as_text(), "XLA's default has changed: time it, the option may no longer be needed"
    assert "ynn" not in compiled(own_contractions()).as_text()
    newer = jax.__version_info__ >= (0, 11)
    assert compiler_options(make_mesh(options(1, 1, 1))) == (own_contractions() if newer else None)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(mesh_module, "_OWN_CONTRACTIONS", {"xla_cpu_no_such_option": "1"})
    assert own_contractions.__wrapped__() is None
