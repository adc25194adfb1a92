"""Draw the figures of the documentation: `python docs/figures/draw.py`, a minute and a half of one core.

residuals.svg: relative residuals against evaluations of f, for three kinds of f. gradients.svg: the error of gradients against
what they cost. Everything in float64, medians over 64 problems of 64 elements.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from deq_flax import GMRES, Anderson, Broyden, Implicit, Neumann, PhantomGradient, Picard, fixed_point
from deq_flax.equilibrium import Gradient

HERE = Path(__file__).parent
BATCH, SIZE, LIMIT = 64, 64, 60
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "deq_flax", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


@functools.cache
def problems(kind: str) -> tuple[jax.Array, jax.Array]:
    """Matrices (BATCH, SIZE, SIZE) and inputs (BATCH, SIZE)."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (BATCH, SIZE))
    if kind == "symmetric":
        basis = jax.random.orthogonal(keys[1], SIZE, (BATCH,))
        values = jax.random.uniform(keys[2], (BATCH, SIZE), minval=-0.97, maxval=0.97)
        return jnp.einsum("bij,bj,bkj->bik", basis, values, basis), x
    if kind == "rotation":
        return 0.97 * jax.random.orthogonal(keys[1], SIZE, (BATCH,)), x
    return 1.3 * jax.random.normal(keys[1], (BATCH, SIZE, SIZE)) / SIZE**0.5, x


def f(z: jax.Array, W: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.einsum("bij,bj->bi", W, z) + 0.5 * x)


KINDS = {
    "symmetric": "symmetric W, norm 0.97",
    "rotation": "W a rotation times 0.97",
    "random": "random W, spectral radius 1.3",
}


def draw_residuals() -> None:
    solvers = {
        "Picard": Picard(tol=1e-13, max_steps=LIMIT, trace=True),
        "Anderson(memory=6)": Anderson(tol=1e-13, max_steps=LIMIT, trace=True),
        "Broyden()": Broyden(tol=1e-13, max_steps=LIMIT, trace=True),
    }
    figure, axes = panels("evaluations of f", "relative residual", lowest=1e-12)
    for name, solver in solvers.items():
        trace = jax.jit(lambda W, x, solver=solver: fixed_point(f, 0 * x, W, x, solver=solver).stats.relative_trace)
        for axis, kind in zip(axes, KINDS, strict=True):
            axis.semilogy(np.arange(1, LIMIT + 1), np.median(trace(*problems(kind)), axis=0), label=name)
    axes[2].legend(loc="lower left")
    save(figure, "residuals.svg")


def draw_gradients() -> None:
    counts = [1, 2, 4, 8, 12, 18, 25]
    gradients = {
        "Neumann(n)": lambda n: Neumann(terms=n),
        "PhantomGradient(n, 0.8)": lambda n: PhantomGradient(steps=n, relaxation=0.8),
        "Implicit(Broyden(0, n))": lambda n: Implicit(solver=Broyden(tol=0, max_steps=n)),
        "Implicit(GMRES(0, n))": lambda n: Implicit(solver=GMRES(tol=0, max_steps=n)),
    }
    figure, axes = panels("products with the Jacobian", "relative error of the gradient", lowest=1e-6)
    exact = slopes(Implicit(solver=Broyden(tol=1e-12, max_steps=120)))
    for name, make in gradients.items():
        errors = np.array([relative_errors(slopes(make(n)), exact) for n in counts])
        for axis, error in zip(axes, errors.T, strict=True):
            axis.semilogy(counts, error, "o-", ms=3, label=name)
    axes[2].legend(loc="lower left")
    save(figure, "gradients.svg")


def slopes(gradient: Gradient) -> list[jax.Array]:
    """The gradient of |z*|^2 with respect to the input, (BATCH, SIZE), for each kind."""

    @jax.jit
    @jax.grad
    def slope(x, W):
        solver = Broyden(tol=1e-12, max_steps=120)
        return jnp.sum(fixed_point(f, 0 * x, W, x, solver=solver, gradient=gradient).value ** 2)

    return [slope(x, W) for W, x in map(problems, KINDS)]


def relative_errors(found: list[jax.Array], exact: list[jax.Array]) -> list[float]:
    """The median over the problems of each kind."""
    norm = functools.partial(np.linalg.norm, axis=1)
    return [float(np.median(norm(a - b) / norm(b))) for a, b in zip(found, exact, strict=True)]


def panels(across: str, up: str, *, lowest: float) -> tuple[plt.Figure, np.ndarray]:
    """Three panels, one for each kind."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.9), sharey=True, layout="constrained")
    for axis, title in zip(axes, KINDS.values(), strict=True):
        axis.set(title=title, xlabel=across, ylim=(lowest, 3))
    axes[0].set_ylabel(up)
    return figure, axes


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None})


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    plt.rcParams.update(STYLE)
    draw_residuals()
    draw_gradients()
