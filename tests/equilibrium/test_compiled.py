"""The compiled loops: histories are updated in place, and the adjoint one does not evaluate f."""

import re

import jax
import jax.numpy as jnp
import pytest

from deq_flax import GMRES, SHINE, Anderson, Broyden, Implicit, fixed_point

B, N, M = 3, 640, 9


def outside_entry(hlo):
    """Return the lines of every computation but the entry one, loop bodies among them."""
    entry, lines = False, []
    for line in hlo.splitlines():
        if line and not line.startswith((" ", "}")):
            entry = line.startswith("ENTRY")
        if not entry:
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("solver", [Anderson(tol=0, memory=M), Broyden(tol=0, max_steps=40, memory=M)], ids=repr)
def test_no_history_is_copied_in_the_loop(solver):
    w = jax.random.normal(jax.random.key(0), (N, N)) / N**0.5 / 2
    step = jax.jit(lambda x: fixed_point(lambda z: jnp.tanh(z @ w + x), jnp.zeros_like(x), solver=solver).value)
    body = outside_entry(step.lower(jnp.ones((B, N))).compile().as_text())
    assert re.search(rf"= f32\[{B},{M},{N}\]\S* dynamic-update-slice\(", body), "no history of this shape is written"
    copies = re.findall(rf"= f32\[{B},{M},{N}\]\S* copy\(.*", body)
    assert not copies, copies


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        (Anderson(memory=3), Implicit(GMRES())),
        (Broyden(), SHINE(refine_steps=3)),
        (Broyden(memory=3), Implicit(Anderson())),
        (Broyden(line_search=True), Implicit()),
    ],
    ids=str,
)
def test_products_of_the_history_are_not_rounded_by_an_accelerator(solver, gradient):
    """By default a TPU rounds the operands of float32 products to bfloat16, which is a floor for the residual."""

    def loss(x):
        return fixed_point(lambda z: 0.5 * jnp.tanh(z) + x, jnp.zeros_like(x), solver=solver, gradient=gradient).value.sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((B, 8))))
    products = re.findall(r"dot_general\[(.*?)\] ", program, re.DOTALL)
    assert products and all("Precision.HIGHEST, Precision.HIGHEST" in options for options in products)


@pytest.mark.parametrize("adjoint", [Broyden(), GMRES(), None], ids=str)
@pytest.mark.parametrize("on_mesh", [False, True])
def test_the_adjoint_solve_does_not_evaluate_f(adjoint, on_mesh):
    """f is linearized at the solution once: its sinh stands in the forward loop alone, and cosh outside of the loops."""

    def loss(w, x):
        f = lambda z, w, x: 0.1 * jnp.sinh(z @ w) + x  # noqa: E731
        return fixed_point(f, jnp.zeros_like(x), w, x, solver=Anderson(), gradient=Implicit(adjoint)).value.sum()

    if on_mesh:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec
        loss = jax.shard_map(loss, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec(), check_vma=False)
    program = jax.jit(jax.grad(loss)).lower(jnp.ones((4, 4)), jnp.ones((2, 4))).as_text()
    assert (program.count("chlo.sinh"), program.count("chlo.cosh")) in {(1, 1), (1, 2)}
