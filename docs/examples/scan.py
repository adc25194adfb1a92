"""Fit the parameter of a stiff differential equation through implicit Euler steps: an equilibrium inside of `jax.lax.scan`.

    python docs/examples/scan.py

Van der Pol's oscillator, y'' = mu (1 - y^2) y' - y. An implicit Euler step is the equation u = u_before + h F(u). The scan
differentiates through all steps; each keeps its solution alone, however many evaluations it took. Every solve starts from the
step before: a warm start.
"""

import jax
import jax.numpy as jnp
import optax

from deq_flax import Broyden, fixed_point

H, STEPS = 0.1, 60


def rate(u: jax.Array, mu: jax.Array) -> jax.Array:
    """F(u) for u = (y, y'), (B, 2)."""
    y, v = u[:, 0], u[:, 1]
    return jnp.stack([v, mu * (1 - y**2) * v - y], axis=1)


def simulate(mu: jax.Array, start: jax.Array):
    """The path (STEPS, B, 2) from start (B, 2), and the evaluations of each step."""

    def step(u, _):
        solution = fixed_point(lambda new: u + H * rate(new, mu), u, solver=Broyden(tol=1e-6, max_steps=30))
        return solution.value, (solution.value, solution.stats.nfe)

    return jax.lax.scan(step, start, None, length=STEPS)[1]


def main(steps: int = 60) -> float:
    """Fit mu to a path, and return it."""
    start = jax.random.uniform(jax.random.key(0), (8, 2), minval=-2.0, maxval=2.0)
    measured, evaluations = simulate(jnp.array(5.0), start)
    print(f"evaluations of a step: {evaluations.mean():.1f} on average, {evaluations.max():.0f} at most")

    @jax.jit
    def update(mu, state):
        loss, slope = jax.value_and_grad(lambda mu: jnp.mean((simulate(mu, start)[0] - measured) ** 2))(mu)
        change, state = optimizer.update(slope, state)
        return mu + change, state, loss

    optimizer = optax.adam(0.1)
    mu = jnp.array(2.0)
    state = optimizer.init(mu)
    for number in range(1, steps + 1):
        mu, state, loss = update(mu, state)
        if number % 20 == 0:
            print(f"step {number}: mu = {mu:.3f}, loss {loss:.2e}")
    return float(mu)


if __name__ == "__main__":
    main()
