"""The problems of `battery.py`: 20 families of 20 fixed-point problems with 32 unknowns each, z = f(z).

Every f is s * phi(A psi(z / s) + c), with elementwise phi and psi chosen by the family, so that one compiled program serves all
of them. The 20 of a family go from its easiest to its hardest parameter.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

FAMILY, N = 20, 32
KINDS = ("linear", "tanh", "relu", "shrink", "residual", "two layers", "Chandrasekhar", "exp", "sqrt")

Problem = dict[str, np.ndarray]
"""kind: index in KINDS; matrix, second (N, N); shift, start (N,); scale: scalar."""


def evaluate(xp: Any, p: dict, z: Any) -> Any:
    """f(z), (..., N), of a problem, by the functions of `xp`: numpy, jax.numpy or torch. NaN outside of f's domain."""
    u = z / p["scale"]
    kind = lambda name: p["kind"] == KINDS.index(name)  # noqa: E731
    product = lambda matrix, x: (matrix * x[..., None, :]).sum(-1)  # noqa: E731
    a = product(p["matrix"], xp.where(kind("exp"), xp.exp(u), u)) + p["shift"]
    inner = xp.where(kind("two layers"), product(p["second"], xp.where(a > 0, a, 0.0 * a)), xp.tanh(a))
    y = u + inner
    y = y - y.mean(-1)[..., None]
    normalized = y / xp.sqrt((y * y).mean(-1)[..., None] + 1e-5)
    out = a  # linear, exp
    for name, value in {
        "tanh": inner,
        "relu": xp.where(a > 0, a, 0.0 * a),
        "shrink": xp.where(abs(a) > 0.1, a - 0.1 * xp.sign(a), 0.0 * a),
        "residual": normalized,
        "two layers": normalized,
        "Chandrasekhar": 1.0 + u * a,
        "sqrt": xp.sqrt(xp.where(a < 0, xp.nan, a)),
    }.items():
        out = xp.where(kind(name), value, out)
    return p["scale"] * out


def battery(seed: int) -> dict[str, list[Problem]]:
    """The problems by family. The options of our solvers were chosen on those of seed 0, which so flatter them."""
    return {name: list(make(np.random.default_rng(1000 * seed + i))) for i, (name, make) in enumerate(FAMILIES.items())}


def residual(p: Problem, z: np.ndarray) -> float:
    """||f(z) - z|| / ||f(z)||; infinite where f is not finite."""
    with np.errstate(all="ignore"):
        fz = evaluate(np, p, z)
        ratio = np.linalg.norm(fz - z) / np.linalg.norm(fz)
    return float(ratio) if np.isfinite(ratio) else np.inf


def _problem(
    kind: str, matrix: np.ndarray, shift: Any = 0.0, *, start: float = 0.0, scale: float = 1.0, second: Any = 0.0
) -> Problem:
    return {
        "kind": np.asarray(KINDS.index(kind)),
        "matrix": np.asarray(matrix, float),
        "second": np.broadcast_to(np.asarray(second, float), (N, N)).copy(),
        "shift": np.broadcast_to(np.asarray(shift, float), N).copy(),
        "scale": np.asarray(float(scale)),
        "start": np.full(N, start * scale),
    }


def _gauss(random: np.random.Generator) -> np.ndarray:
    """A matrix with spectral radius about 1."""
    return random.normal(size=(N, N)) / N**0.5


def _symmetric(random: np.random.Generator, eigenvalues: np.ndarray) -> np.ndarray:
    q = np.linalg.qr(_gauss(random))[0]
    return q * eigenvalues @ q.T


def _network(kind: str, low: float, high: float):
    """phi(gain W z + c), W Gaussian of spectral radius 1."""

    def make(random: np.random.Generator) -> Iterator[Problem]:
        for gain in np.linspace(low, high, FAMILY):
            yield _problem(kind, gain * _gauss(random), random.normal(size=N))

    return make


def _spectrum(low: float, high: float):
    """Linear and symmetric; eigenvalues uniform in an interval, both ends among them."""

    def make(random: np.random.Generator) -> Iterator[Problem]:
        for _ in range(FAMILY):
            eigenvalues = np.append(random.uniform(low, high, N - 2), [low, high])
            yield _problem("linear", _symmetric(random, eigenvalues), random.normal(size=N))

    return make


def _outliers(random: np.random.Generator) -> Iterator[Problem]:
    """A contraction of radius 0.6, but for 1 to 8 eigenvalues from 1.5 to 4 or from -4 to -1.5."""
    for count in np.linspace(1, 8, FAMILY).astype(int):
        eigenvalues = random.uniform(-0.6, 0.6, N)
        eigenvalues[:count] = random.uniform(1.5, 4.0, count) * random.choice([-1, 1], count)
        yield _problem("linear", _symmetric(random, eigenvalues), random.normal(size=N))


def _rotations(random: np.random.Generator) -> Iterator[Problem]:
    """Planes rotated by 1 to 16 different angles, with radius 0.9 to 1.5."""
    for i, radius in enumerate(random.permutation(np.linspace(0.9, 1.5, FAMILY))):
        angles = np.resize(random.uniform(0.1 * np.pi, np.pi, 1 + i * 15 // (FAMILY - 1)), N // 2)
        blocks = np.zeros((N, N))
        for j, angle in enumerate(angles):
            blocks[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        q = np.linalg.qr(_gauss(random))[0]
        yield _problem("linear", radius * q @ blocks @ q.T, random.normal(size=N))


def _non_normal(random: np.random.Generator) -> Iterator[Problem]:
    """0.5 I plus nilpotent blocks of size 3 with couplings 1 to 4."""
    coupled = np.diag((np.arange(N - 1) % 3 < 2).astype(float), 1)
    for coupling in np.linspace(1, 4, FAMILY):
        yield _problem("linear", 0.5 * np.eye(N) + coupling * coupled, random.normal(size=N))


def _triangular(random: np.random.Generator) -> Iterator[Problem]:
    """Strictly upper triangular plus a diagonal of radius 0.7."""
    for size in np.linspace(0.5, 2.0, FAMILY):
        matrix = np.triu(size * _gauss(random), 1) + np.diag(random.uniform(-0.7, 0.7, N))
        yield _problem("linear", matrix, random.normal(size=N))


def _scales(random: np.random.Generator) -> Iterator[Problem]:
    """tanh networks whose state is scaled by 1e-6 to 1e6."""
    for scale in np.logspace(-6, 6, FAMILY):
        yield _problem("tanh", 0.8 * _gauss(random), random.normal(size=N), scale=scale)


def _lasso(random: np.random.Generator) -> Iterator[Problem]:
    """Shrinkage of a gradient step of least squares with 24 to 128 measurements."""
    for rows in np.linspace(24, 128, FAMILY).astype(int):
        x = random.normal(size=(rows, N))
        step = 1.0 / np.linalg.norm(x, 2) ** 2
        truth = random.normal(size=N) * (random.random(N) < 0.3)
        yield _problem("shrink", np.eye(N) - step * x.T @ x, 3 * step * x.T @ (x @ truth))


def _residual(random: np.random.Generator) -> Iterator[Problem]:
    """norm(z + tanh(gain W z + c))."""
    for gain in np.linspace(0.2, 1.5, FAMILY):
        yield _problem("residual", gain * _gauss(random), random.normal(size=N))


def _two_layers(random: np.random.Generator) -> Iterator[Problem]:
    """norm(z + gain V relu(W z + c))."""
    for gain in np.linspace(0.2, 1.5, FAMILY):
        yield _problem("two layers", _gauss(random), random.normal(size=N), second=gain * _gauss(random))


def _chandrasekhar(random: np.random.Generator) -> Iterator[Problem]:
    """H = 1 + H * A H, the H-equation of radiative transfer with albedo 0.5 to 0.999."""
    mu = (np.arange(N) + 0.5) / N
    for albedo in np.linspace(0.5, 0.999, FAMILY):
        yield _problem("Chandrasekhar", 0.5 * albedo / N * mu[:, None] / (mu[:, None] + mu[None]), start=1.0)


def _bratu(random: np.random.Generator) -> Iterator[Problem]:
    """-u'' = lambda exp(u) on (0, 1), u = 0 at both ends, by Green's function; lambda up to 3.4, the fold being at 3.51."""
    laplacian = (2 * np.eye(N) - np.eye(N, k=1) - np.eye(N, k=-1)) * (N + 1) ** 2
    for strength in np.linspace(0.2, 3.4, FAMILY):
        yield _problem("exp", strength * np.linalg.inv(laplacian))


def _domain(random: np.random.Generator) -> Iterator[Problem]:
    """sqrt(gain W z + c), undefined where an argument is negative."""
    for gain in np.linspace(0.2, 1.0, FAMILY):
        yield _problem("sqrt", gain * _gauss(random), 3.0 + random.random(N), start=1.0)


FAMILIES = {
    "linear, contractive": _network("linear", 0.3, 0.9),
    "tanh, contractive": _network("tanh", 0.3, 0.95),
    "tanh, gain 1.5": _network("tanh", 1.5, 1.5),
    "tanh, gain 3": _network("tanh", 3.0, 3.0),
    "relu": _network("relu", 0.5, 1.2),
    "symmetric, to 0.9": _spectrum(-0.9, 0.9),
    "symmetric, to 0.99": _spectrum(-0.99, 0.99),
    "negative, to -2": _spectrum(-2.0, 0.5),
    "negative, to -8": _spectrum(-8.0, 0.5),
    "rotations": _rotations,
    "non-normal blocks": _non_normal,
    "triangular": _triangular,
    "scales 1e-6 to 1e6": _scales,
    "lasso": _lasso,
    "residual, post-norm": _residual,
    "two layers, post-norm": _two_layers,
    "Chandrasekhar": _chandrasekhar,
    "Bratu": _bratu,
    "domain-limited": _domain,
    "outliers": _outliers,
}
"""Name -> maker of its problems."""
