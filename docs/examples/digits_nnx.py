"""Classify handwritten digits with one equilibrium layer: plain Flax NNX and Optax.

    python docs/examples/digits_nnx.py

The model is linear - equilibrium - linear. The layer is used like any other NNX module: its solver and the gradient of its
solution are two arguments, and `nnx.jit`, `nnx.value_and_grad` and `nnx.Optimizer` know nothing of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from deq_flax import Anderson, Broyden, Equilibrium, Implicit


class Cell(nnx.Module):
    """f(z, x) = x + a network of one hidden layer. It starts small, so that the first equilibria are easy to find."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        small = nnx.initializers.variance_scaling(0.1, "fan_in", "normal")
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, kernel_init=small, rngs=rngs)

    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.relu(self.up(z)))


class Classifier(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(64, width, rngs=rngs)
        self.layer = Equilibrium(
            Cell(width, rngs=rngs),
            solver=Anderson(tol=1e-3, max_steps=30),
            gradient=Implicit(solver=Broyden(tol=1e-3, max_steps=30)),
        )
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array):
        x = self.encoder(images)
        solution = self.layer(jnp.zeros_like(x), x)
        return self.head(solution.value), solution.stats


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array):
    def loss_fn(model):
        logits, stats = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

    (loss, stats), gradient = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradient)
    return loss, stats


def main(steps: int = 400) -> float:
    """Train, and return the accuracy on digits of other writers."""
    digits = load_digits()
    images, labels = jnp.asarray((digits.data / 16 - 0.3) / 0.37, jnp.float32), jnp.asarray(digits.target)
    model = Classifier(32, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3)), wrt=nnx.Param)
    order = np.random.default_rng(0)
    for step in range(1, steps + 1):
        batch = order.integers(0, 1437, 64)  # the first four fifths
        loss, stats = train_step(model, optimizer, images[batch], labels[batch])
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}, {stats.nfe:.0f} evaluations, {stats.converged.mean():.0%} converged")
    logits, stats = nnx.jit(lambda model, images: model(images))(model, images[1437:])
    accuracy = float(jnp.mean(logits.argmax(-1) == labels[1437:]))
    print(f"test accuracy {accuracy:.3f}, {stats.nfe:.0f} evaluations, {stats.converged.mean():.0%} converged")
    return accuracy


if __name__ == "__main__":
    main()
