"""Label the nodes of long chains by what only their first node knows: an implicit graph network (Gu et al. 2020).

    python docs/examples/graph_network.py

A graph network of n layers sees n steps far. The equilibrium of Z = tanh(A Z W + X), with A the normalized adjacency, sees all
of the graph with one layer's parameters. The nodes depend on each other: the whole graph is one problem, `batched=False`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deq_flax import Broyden, Equilibrium, spectral_normalized

CHAINS, LENGTH = 20, 15


class Propagation(nnx.Module):
    """f(Z, X, W): each node's state from its neighbors' states and its own input."""

    def __init__(self, width: int, senders: np.ndarray, receivers: np.ndarray, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.orthogonal()(rngs.params(), (width, width)))
        self.senders, self.receivers, degree = jnp.asarray(senders), jnp.asarray(receivers), np.bincount(receivers)
        self.weights = jnp.asarray((degree[senders] * degree[receivers]) ** -0.5, jnp.float32)[:, None]

    def bounded_kernel(self) -> jax.Array:
        """W with a spectral norm of at most 0.97: f contracts, and has one equilibrium whatever is learned."""
        return spectral_normalized(self.kernel[...], jnp.ones(self.kernel.shape[1]), bound=0.97, steps=10)[0]

    def __call__(self, z: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        messages = self.weights * (z @ kernel)[self.senders]
        return jnp.tanh(jax.ops.segment_sum(messages, self.receivers, num_segments=z.shape[0]) + x)


class GraphNetwork(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        left = np.arange(CHAINS * LENGTH).reshape(CHAINS, LENGTH)[:, :-1].ravel()
        edges = np.concatenate([left, left + 1]), np.concatenate([left + 1, left])
        self.encoder = nnx.Linear(2, width, use_bias=False, rngs=rngs)
        self.cell = Propagation(width, *edges, rngs=rngs)
        self.layer = Equilibrium(self.cell, solver=Broyden(tol=1e-5, max_steps=80), batched=False)
        self.head = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, features: jax.Array):
        x = self.encoder(features)
        solution = self.layer(jnp.zeros_like(x), x, self.cell.bounded_kernel())
        # The state fades along a chain: its direction tells the label.
        return self.head(solution.value / jnp.linalg.norm(solution.value, axis=1, keepdims=True)), solution.stats


@nnx.jit
def train_step(model, optimizer, features, labels, known):
    def loss_fn(model):
        logits, stats = model(features)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(where=known), (logits, stats)

    (loss, (logits, stats)), gradient = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradient)
    return loss, jnp.mean(logits.argmax(-1) == labels, where=~known), stats


def main(steps: int = 100) -> float:
    """Train on the labels of a quarter of the nodes, and return the accuracy on the others."""
    chain, place = np.divmod(np.arange(CHAINS * LENGTH), LENGTH)
    labels, known = chain % 2, np.random.default_rng(0).random(CHAINS * LENGTH) < 0.25
    features = np.eye(2, dtype=np.float32)[labels] * (place == 0)[:, None]
    model = GraphNetwork(16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for step in range(1, steps + 1):
        loss, accuracy, stats = train_step(model, optimizer, features, labels, known)
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}, accuracy {accuracy:.3f}, {stats.nfe:.0f} evaluations")
    return float(accuracy)


if __name__ == "__main__":
    main()
