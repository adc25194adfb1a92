"""Laws of the MDEQ that need no reference numbers: equilibria, randomness, running statistics, refused options."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_flax.equilibrium import Broyden, Implicit, Picard, backward_probe
from deq_flax.models.mdeq import MDEQ, MDEQOptions
from deq_flax.nn.resize import resize_bilinear
from tests.reference import flat, solving

SMALL = dict(num_classes=5, expansion=2, groups=2)
SOLVER = Broyden(tol=1e-5, max_steps=60)


def build(n_branches=2, head="classification", **options):
    sizes = dict(head_channels=(2,) * n_branches, final_channels=6) if head == "classification" else {}
    options = SMALL | sizes | dict(fuse_norm_affine=True) | options
    model = MDEQ(MDEQOptions(channels=(4, 4, 8, 8)[:n_branches], head=head, **options), rngs=nnx.Rngs(0))
    # A new cell does not contract before it is pretrained. One whose blocks barely depend on their input does.
    for block in model.cell.blocks:
        block.norm1.scale_C[...], block.norm1.bias_C[...] = 0.1 * block.norm1.scale_C[...], 1 + block.norm1.bias_C[...]
        block.norm3.scale_C[...] = 0.3 * block.norm3.scale_C[...]
    for layer in model.stem.layers:
        layer.norm.scale_C[...] = 20 * layer.norm.scale_C[...]
    return model


def images(batch_size=2, height=8, width=8, channels=3, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch_size, height, width, channels))


@partial(jax.jit, static_argnums=0, static_argnames=("solver", "gradient"))
def run(graphdef, state, x, key=None, **options):
    model = nnx.merge(graphdef, state, copy=True)
    return model(x, solve=solving(**options), key=key), nnx.state(model, nnx.BatchStat)


@pytest.mark.parametrize(
    ("n_branches", "head"),
    [
        (1, "classification"),
        (4, "classification"),
        (2, "segmentation"),
    ],
)
@pytest.mark.slow
def test_the_branches_are_an_equilibrium_and_logits_have_the_shape_of_the_task(n_branches, head):
    model, x = build(n_branches, head, in_channels=1, downsample=1), images(height=13, width=10, channels=1)
    out, _ = run(*nnx.split(model), x, solver=SOLVER)
    assert (out.stats.converged == 1).all()
    assert out.logits.shape == ((2, 5) if head == "classification" else (2, 13, 10, 5))
    again = model.equation(x).f(out.branches)
    for z, fz in zip(out.branches, again, strict=True):
        assert np.linalg.norm(fz - z) < 1e-4 * np.linalg.norm(z)
    if head == "segmentation":
        np.testing.assert_allclose(out.logits, resize_bilinear(model.head(out.branches, False), (13, 10)), atol=1e-5)


@pytest.mark.slow
def test_three_downsamplings():
    model = build(1, downsample=3)
    assert [z.shape for z in model.equation(images(height=20, width=16)).z0] == [(2, 3, 2, 4)]


@pytest.mark.slow
def test_evaluation_is_deterministic_and_independent_for_each_image():
    state = nnx.split(build(dropout=0.5))
    x = images(4)
    (together, kept), (apart, _) = run(*state, x, solver=SOLVER), run(*state, x[:2], solver=SOLVER)
    np.testing.assert_allclose(together.logits[:2], apart.logits, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, flat(kept), flat(nnx.state(nnx.merge(*state), nnx.BatchStat)))


def test_training_draws_masks_and_updates_statistics_once():
    graphdef, state = nnx.split(build(dropout=0.5))
    once, after = run(graphdef, state, images(), solver=SOLVER, key=jax.random.key(1))
    same, _ = run(graphdef, state, images(), solver=SOLVER, key=jax.random.key(1))
    other, _ = run(graphdef, state, images(), solver=SOLVER, key=jax.random.key(2))
    np.testing.assert_array_equal(once.logits, same.logits)
    assert (once.logits != other.logits).any()
    # The stem's first convolution is outside the solve: its running statistics show how often they were updated.
    y = nnx.merge(graphdef, state).stem.layers[0].conv(images())
    np.testing.assert_allclose(flat(after)["stem/layers/0/norm/mean_C"], 0.1 * y.mean((0, 1, 2)), atol=1e-6)


@pytest.mark.slow
def test_a_key_without_dropout_normalizes_by_the_batch_and_draws_nothing():
    state = nnx.split(build(dropout=0.0))
    (a, after), (b, _) = (run(*state, images(), solver=SOLVER, key=jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(a.logits, b.logits)
    # The same images twice have the statistics of the batch; one of them alone has others.
    (twice, _), (alone, _) = (
        run(*state, x, solver=SOLVER, key=jax.random.key(0)) for x in (jnp.concatenate([images()] * 2), images()[:1])
    )
    np.testing.assert_allclose(twice.logits[:2], a.logits, atol=1e-4)
    assert np.abs(alone.logits - a.logits[:1]).max() > 1e-2
    assert flat(after)["head/final/norm/mean_C"].any()


@pytest.mark.slow
def test_the_jacobian_loss_and_the_statistics_of_the_adjoint_solve():
    graphdef, params, rest = nnx.split(build(1), nnx.Param, ...)

    def solve(probe, through):
        options = dict(jacobian_key=jax.random.key(1), jacobian_through_equilibrium=through)
        return solving(solver=Picard(tol=1e-4), gradient=Implicit(), probe=probe, **options)

    @partial(jax.jit, static_argnums=2)
    def gradients(params, probe, through):
        def loss(params, probe):
            out = nnx.merge(graphdef, params, rest, copy=True)(images(), solve=solve(probe, through), key=jax.random.key(0))
            return out.jacobian_loss

        return jax.value_and_grad(loss, argnums=(0, 1))(params, probe)

    (value, (held, silent)), (same, (through, report)) = (gradients(params, backward_probe(), t) for t in (False, True))
    assert value > 0
    np.testing.assert_allclose(value, same, rtol=1e-5)
    assert not silent.any() and report[0] > 1 and report[2] == 1
    held, through = flat(held), flat(through)
    assert not held["head/classifier/weight_IO"].any() and not through["head/classifier/weight_IO"].any()
    assert all((held[path] != x).any() for path, x in through.items() if path.startswith("cell/"))


def test_the_limit_on_evaluations_is_traced():
    graphdef, state = nnx.split(build())
    out = [run(graphdef, state, images(), solver=Picard(tol=0.0, max_steps=9), max_steps=jnp.int32(k))[0] for k in (2, 5)]
    assert [int(o.stats.nfe) for o in out] == [2, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head="detection"), "known: classification, segmentation"),
        (dict(head_channels=(2,)), "head_channels for each branch"),
        (dict(final_channels=0), "final_channels"),
        (dict(head="segmentation", last_kernel=5), "last_kernel is 1 or 3"),
        (dict(downsample=-1), "downsample must be"),
        (dict(norm_momentum=0.0), "norm_momentum in"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**options))
