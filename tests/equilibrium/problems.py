"""Problems for solvers, as samples of one batch: a solver is compiled once for all of them."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from deq_flax import Anderson, Broyden, Picard, Solver, fixed_point

N, STEPS = 12, 100
RECORDED = (0, 3, 20)
OPTIONS = {"max_steps": STEPS, "trace": True, "trajectory_steps": RECORDED}
SOLVERS = [
    Picard(relaxation=0.5, **OPTIONS),
    Picard(adaptive=True, **OPTIONS),
    Anderson(**OPTIONS),
    Anderson(relaxation=0.7, memory=3, restart=True, **OPTIONS),
    Broyden(**OPTIONS),
    Broyden(line_search=True, **OPTIONS),
    Broyden(memory=8, **OPTIONS),
]


def name(solver):
    plain = type(solver)(**OPTIONS)
    return type(solver).__name__ + "".join(f" {k}={v}" for k, v in vars(solver).items() if v != vars(plain)[k])


@dataclass(frozen=True)
class HeavyBall(Solver):
    """A solver as a user writes it: z_{k+1} = z_k + g_k + momentum (z_k - z_{k-1})."""

    momentum: float = 0.2

    def init(self, z):
        return z

    def step(self, k, z, g, before):
        return z + g + self.momentum * (z - before), z


@dataclass(frozen=True)
class Problem:
    """The map f(z) = phi(A z + c) + noise sin(1e6 z), NaN where max |z| > poison; phi is tanh or the identity."""

    matrix: np.ndarray
    shift: np.ndarray
    start: np.ndarray
    smooth: bool = True
    noise: float = 0.0
    poison: float = np.inf
    solvable: bool = True


def _table():
    rng = np.random.default_rng(0)
    gauss = lambda: rng.normal(size=(N, N)) / N**0.5  # noqa: E731
    orthogonal = np.linalg.qr(gauss())[0]
    c, zero, eye = rng.normal(size=N), np.zeros(N), np.eye(N)
    blocks = 3.0 * np.diag((np.arange(N - 1) % 3 < 2).astype(float), 1)
    stiff = np.diag(np.where(np.arange(N) < 6, 0.9, -20.0)) + 0.3 * gauss()
    mild = 0.3 * gauss()
    return {
        "contractive": Problem(0.6 * gauss(), c, zero),
        "spectral radius 2 at the start": Problem(-2.0 * eye + 0.3 * gauss(), c, zero),
        "cond(I - J) = 1000": Problem(eye - orthogonal * np.logspace(-3, 0, N) @ orthogonal.T, c, zero, smooth=False),
        "non-normal": Problem(0.5 * eye + blocks, c, zero, smooth=False),
        "stiff": Problem(stiff, c * np.where(np.arange(N) < 6, 1.0, 100.0), zero, smooth=False),
        "noise floor": Problem(0.6 * gauss(), c, zero, noise=1e-4, solvable=False),
        "NaN on the way": Problem(0.6 * gauss(), 2.0 * c, zero, poison=0.1, solvable=False),
        "NaN at the start": Problem(0.6 * gauss(), c, zero, poison=-1.0, solvable=False),
        "solved at the start": Problem(mild, c, np.linalg.solve(eye - mild, c), smooth=False),
        "zero map": Problem(0.0 * eye, zero, c, smooth=False),
    }


TABLE = _table()
NAMES = list(TABLE)


def stack(problems):
    """Return the problems as arrays of one batch, in the current precision."""
    rows = {key: np.stack([np.atleast_1d(getattr(p, key)) for p in problems]) for key in Problem.__dataclass_fields__}
    return {key: jnp.asarray(x, bool if x.dtype == bool else float) for key, x in rows.items()}


def value_of(problem, z):
    """Return f(z) by numpy, for one sample."""
    pre = problem.matrix @ z + problem.shift
    out = (np.tanh(pre) if problem.smooth else pre) + problem.noise * np.sin(1e6 * z)
    return np.where(np.abs(z).max() > problem.poison, np.nan, out)


def evaluate(p, z):
    pre = jnp.einsum("bij,bj->bi", p["matrix"], z) + p["shift"]
    out = jnp.where(p["smooth"], jnp.tanh(pre), pre) + p["noise"] * jnp.sin(1e6 * z)
    return jnp.where(jnp.max(jnp.abs(z), axis=1, keepdims=True) > p["poison"], jnp.nan, out)


@functools.partial(jax.jit, static_argnames="solver")
def _solve(p, solver):
    return fixed_point(lambda z: evaluate(p, z), p["start"], solver=solver)


@functools.cache
def solved(solver, healthy=False):
    """Solve the whole table in float64; with `healthy`, a mild problem replaces each that has no solution."""
    mild = TABLE["contractive"]
    with jax.enable_x64(True):
        return jax.device_get(_solve(stack([p if p.solvable or not healthy else mild for p in TABLE.values()]), solver))


def solved_alone(solver, problem):
    with jax.enable_x64(True):
        return jax.device_get(_solve(stack([problem]), solver))


def solved_thousand(solver):
    """Solve a thousand mild problems in float32."""
    rng = np.random.default_rng(1)
    matrices, shifts = 0.4 * rng.normal(size=(1000, N, N)) / N**0.5, rng.normal(size=(1000, N))
    problems = [Problem(m, c, np.zeros(N)) for m, c in zip(matrices, shifts, strict=True)]
    return jax.device_get(_solve(stack(problems), solver))
