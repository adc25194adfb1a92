"""Laws of stored parameters: metadata decides what `tensor` splits, shapes what `fsdp` splits; norms are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from deq_flax.devices.mesh import MeshOptions, make_mesh
from deq_flax.devices.sharding import gathered_specs, manual_axes, manual_specs, named_shardings, opt_shardings, param_specs
from deq_flax.errors import UserError


class Kernel(nnx.Module):
    """One array, with metadata or none."""

    def __init__(self, *shape, names=None):
        metadata = {} if names is None else {"out_sharding": names, "eager_sharding": False}
        self.kernel = nnx.Param(jnp.zeros(shape), **metadata)
        self.statistics = nnx.BatchStat(jnp.zeros(8))


class Model(nnx.Module):
    def __init__(self, **kernels):
        self.parts = nnx.List([Kernel(4, 2)])
        for name, kernel in kernels.items():
            setattr(self, name, kernel)


def mesh(data=1, fsdp=1, tensor=1):
    return make_mesh(MeshOptions(data=data, fsdp=fsdp, tensor=tensor))


def spec(kernel, **sizes):
    return param_specs(Model(k=kernel, split=Kernel(8, names=("tensor",))), mesh(**sizes))["k"]["kernel"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((None, "tensor"), P(None, "tensor")),
        (("tensor", None), P("tensor", None)),
        ((None, None), P(None, None)),
        (None, P(None, None)),
    ],
)
def test_metadata_decides_what_tensor_splits(names, expected):
    assert spec(Kernel(4, 6, names=names), tensor=2) == expected
    assert spec(Kernel(4, 6, names=names)) == P(None, None)  # nothing to split over


def test_tensor_splits_only_what_divides():
    assert spec(Kernel(4, 6, names=(None, "tensor")), tensor=4) == P(None, None)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 8), P(None, "fsdp")),
        ((8, 4), P("fsdp", None)),
        ((4, 9), P("fsdp", None)),  # the longest that divides
        ((4, 4), P("fsdp", None)),
        ((3, 5), P(None, None)),
        ((0, 2), P(None, "fsdp")),  # never an axis without elements
        ((), P()),
    ],
)
def test_fsdp_splits_the_longest_axis_that_divides(shape, expected):
    assert spec(Kernel(*shape), fsdp=2) == expected


def test_fsdp_splits_an_axis_that_tensor_does_not():
    assert spec(Kernel(4, 6, names=(None, "tensor")), fsdp=2, tensor=2) == P("fsdp", "tensor")
    assert spec(Kernel(6, names=("tensor",)), fsdp=2, tensor=2) == P("tensor")


def test_specs_are_those_of_the_pure_parameters_however_they_are_given():
    model = Model(a=Kernel(4, 6, names=(None, "tensor")), b=Kernel(3))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    specs = param_specs(model, mesh(fsdp=2, tensor=2))
    assert specs == {"a": {"kernel": P("fsdp", "tensor")}, "b": {"kernel": P(None)}, "parts": {0: {"kernel": P("fsdp", None)}}}
    assert jax.tree.structure(specs) == jax.tree.structure(nnx.to_pure_dict(params))
    shapes = jax.eval_shape(lambda: (nnx.to_pure_dict(params), nnx.to_pure_dict(rest)))
    for other in (params, nnx.merge(graphdef, *shapes), nnx.eval_shape(lambda: model)):
        assert param_specs(other, mesh(fsdp=2, tensor=2)) == specs


def test_a_tensor_axis_needs_something_to_split():
    model = Model(a=Kernel(4, 8, names=(None, "tensor")), b=Kernel(6, 6))
    with pytest.raises(UserError, match="no kernel of this model can be split in so many"):
        param_specs(model, mesh(tensor=3))
    assert param_specs(model, mesh(tensor=4))["a"]["kernel"] == P(None, "tensor")


def test_a_step_handles_all_axes_but_tensor():
    specs = {"k": P("fsdp", "tensor")}
    assert manual_axes(mesh(data=2, tensor=2)) == {"data", "fsdp"}
    assert manual_axes(mesh(data=2)) == {"data", "fsdp", "tensor"}  # of one device each: nothing to leave to the compiler
    assert manual_specs(specs) == {"k": P("fsdp", None)}
    assert gathered_specs(specs) == {"k": P(None, "tensor")}


@pytest.mark.parametrize(
    "optimizer", [optax.lamb(0.1, weight_decay=0.1), optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))]
)
def test_norms_are_of_whole_parameters(optimizer):
    random = np.random.default_rng(0)
    shapes = {"a": (16, 3), "b": (8,)}
    params, gradient = ({name: random.normal(size=shape) for name, shape in shapes.items()} for _ in range(2))
    model = nnx.Dict({name: nnx.Param(x) for name, x in params.items()})
    by_param = named_shardings(param_specs(model, mesh(fsdp=8)), mesh(fsdp=8))
    assert by_param["a"].spec == P("fsdp", None)

    @jax.jit
    def update(params, gradient):
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    want = update(params, gradient)
    got = update(*jax.device_put((params, gradient), (by_param, by_param)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_moments_are_sharded_like_their_parameters():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    params = {"a": jnp.zeros((16, 3)), "b": jnp.zeros(3)}
    model = nnx.Dict({name: nnx.Param(x) for name, x in params.items()})
    by_param = named_shardings(param_specs(model, mesh(fsdp=8)), mesh(fsdp=8))
    by_opt = opt_shardings(optimizer, params, by_param, mesh(fsdp=8))
    state = jax.jit(optimizer.init, out_shardings=by_opt)(jax.device_put(params, by_param))
    parts = {x.shape: x.addressable_shards[0].data.shape for x in jax.tree.leaves(state)}
    assert parts == {(16, 3): (2, 3), (3,): (3,), (): ()}
