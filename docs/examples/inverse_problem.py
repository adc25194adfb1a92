"""Find the parameters of a nonlinear differential equation from its measured solution: plain JAX, no network, no Flax.

    python docs/examples/inverse_problem.py

-u'' + k u^3 = a sin(pi x) on (0, 1) with u = 0 at both ends. Solved for u, this is the fixed point of
u -> L^-1 (a sin(pi x) - k u^3), where L is the discrete -d^2/dx^2. Gauss-Newton steps on (k, a) need the derivative of the
solution with respect to the parameters: `jax.jacfwd` of the solve gives it, one linear solve for each parameter.
"""

import jax
import jax.numpy as jnp

from deq_flax import Broyden, fixed_point

POINTS = 63
X = jnp.linspace(0, 1, POINTS + 2)[1:-1]
LAPLACIAN = (2 * jnp.eye(POINTS) - jnp.eye(POINTS, k=1) - jnp.eye(POINTS, k=-1)) * (POINTS + 1) ** 2
INVERSE = jnp.linalg.inv(LAPLACIAN)


def solve(parameters: jax.Array):
    """The solution for parameters (k, a), with its statistics."""
    k, a = parameters

    def f(u):
        return INVERSE @ (a * jnp.sin(jnp.pi * X) - k * u**3)

    # One problem without a batch axis. Plain iteration diverges: f is steep where u is large.
    return fixed_point(f, jnp.zeros(POINTS), solver=Broyden(tol=1e-5, max_steps=40), batched=False)


@jax.jit
def gauss_newton(parameters: jax.Array, measured: jax.Array):
    """One step toward the parameters whose solution is the measured one."""
    jacobian = jax.jacfwd(lambda p: solve(p).value)(parameters)
    solution = solve(parameters)
    step = jnp.linalg.lstsq(jacobian, measured - solution.value)[0]
    return parameters + step, solution.stats


def main(steps: int = 5) -> jax.Array:
    """Fit (k, a), and return them."""
    true = jnp.array([10.0, 20.0])
    noise = 1e-3 * jax.random.normal(jax.random.key(0), (POINTS,))
    measured = solve(true).value + noise
    parameters = jnp.array([3.0, 10.0])
    for step in range(steps):
        parameters, stats = gauss_newton(parameters, measured)
        print(f"step {step + 1}: k = {parameters[0]:.3f}, a = {parameters[1]:.3f} ({stats.nfe:.0f} evaluations a solve)")
    print(f"true:   k = {true[0]:.3f}, a = {true[1]:.3f}")
    return parameters


if __name__ == "__main__":
    main()
