"""Train on four devices, each solving its own part of the batch: `jax.shard_map` around the loss.

    JAX_NUM_CPU_DEVICES=4 python docs/examples/sharded.py

The solver's loop contains no communication: a device stops when its own samples have converged, however long the others take.
Gradients are averaged once, after the adjoint solve.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deq_flax import Anderson, fixed_point

DEVICES, WIDTH = 4, 32


def init(key: jax.Array) -> dict[str, jax.Array]:
    inner, outer, head, bias = jax.random.split(key, 4)
    return {
        "inner": 0.5 * jax.random.normal(inner, (WIDTH, WIDTH)) / WIDTH**0.5,
        "outer": jax.random.normal(outer, (2, WIDTH)),
        "bias": jax.random.normal(bias, (WIDTH,)),
        "head": jax.random.normal(head, (WIDTH,)) / WIDTH,
    }


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array):
    """The loss of the whole batch, and this device's evaluations; x and y are this device's part."""

    def f(z, x):
        return jnp.tanh(z @ params["inner"] + x @ params["outer"] + params["bias"][None])

    solution = fixed_point(f, jnp.zeros((len(x), WIDTH)), x, solver=Anderson(tol=1e-4, max_steps=40))
    loss = jnp.mean((solution.value @ params["head"] - y) ** 2)
    return jax.lax.pmean(loss, "data"), solution.stats.nfe[None]


def main(steps: int = 200) -> tuple[float, list[float]]:
    """Train, and return the last loss and the evaluations on each device."""
    mesh = jax.make_mesh((DEVICES,), ("data",), devices=jax.devices()[:DEVICES])
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    params = jax.device_put(init(jax.random.key(0)), everywhere)
    optimizer = optax.adam(1e-2)
    state = jax.device_put(optimizer.init(params), everywhere)
    in_specs, out_specs = (P(), P("data"), P("data")), (P(), P("data"))
    sharded_loss = jax.shard_map(loss_fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    @jax.jit
    def train_step(params, state, x, y):
        (loss, evaluations), gradient = jax.value_and_grad(sharded_loss, has_aux=True)(params, x, y)
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state, loss, evaluations

    random = np.random.default_rng(0)
    for step in range(1, steps + 1):
        x = random.uniform(-2, 2, (256, 2)).astype(np.float32)
        x, y = jax.device_put((x, x[:, 0] * x[:, 1]), split)
        params, state, loss, evaluations = train_step(params, state, x, y)
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}, evaluations on each device {[int(n) for n in evaluations]}")
    return float(loss), [float(n) for n in evaluations]


if __name__ == "__main__":
    main()
