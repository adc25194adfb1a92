"""Classify handwritten digits with one equilibrium layer: plain JAX and Optax, parameters in a dictionary.

    python docs/examples/digits_jax.py

The model is that of digits_nnx.py. A function is all that `fixed_point` needs: parameters are arguments of f, and their
gradient comes through the solution.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from deq_flax import Anderson, Broyden, Implicit, fixed_point

WIDTH = 32
SOLVER, GRADIENT = Anderson(tol=1e-3, max_steps=30), Implicit(solver=Broyden(tol=1e-3, max_steps=30))


def init(key: jax.Array) -> dict[str, jax.Array]:
    shapes = {"encoder": (64, WIDTH), "up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH), "head": (WIDTH, 10)}
    keys = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5 for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params | {"down": 0.3 * params["down"], "bias": jnp.zeros(2 * WIDTH)}


def f(z: jax.Array, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """x + a network of one hidden layer. It starts small, so that the first equilibria are easy to find."""
    return x + jax.nn.relu(z @ params["up"] + params["bias"][None]) @ params["down"]


@jax.jit
def apply(params: dict[str, jax.Array], images: jax.Array):
    x = images @ params["encoder"]
    solution = fixed_point(f, jnp.zeros_like(x), params, x, solver=SOLVER, gradient=GRADIENT)
    return solution.value @ params["head"], solution.stats


def loss_fn(params: dict[str, jax.Array], images: jax.Array, labels: jax.Array):
    logits, stats = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats


def main(steps: int = 400) -> float:
    """Train, and return the accuracy on digits of other writers."""
    digits = load_digits()
    images, labels = jnp.asarray((digits.data / 16 - 0.3) / 0.37, jnp.float32), jnp.asarray(digits.target)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    params = init(jax.random.key(0))
    state, order = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def train_step(params, state, images, labels):
        (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, images, labels)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, loss, stats

    for step in range(1, steps + 1):
        batch = order.integers(0, 1437, 64)  # the first four fifths
        params, state, loss, stats = train_step(params, state, images[batch], labels[batch])
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}, {stats.nfe:.0f} evaluations, {stats.converged.mean():.0%} converged")
    logits, stats = apply(params, images[1437:])
    accuracy = float(jnp.mean(logits.argmax(-1) == labels[1437:]))
    print(f"test accuracy {accuracy:.3f}, {stats.nfe:.0f} evaluations, {stats.converged.mean():.0%} converged")
    return accuracy


if __name__ == "__main__":
    main()
