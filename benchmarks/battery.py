"""How many problems solvers solve, ours beside other libraries', and ours on our own models.

    pip install -r requirements.txt -r requirements-bench.txt
    python -m benchmarks.battery [--seed 1] [--write]

The problems are those of `battery_problems.py`: 20 families of 20, float64. A problem is solved if ||f(z) - z|| / ||f(z)|| of
the returned z, computed by NumPy, is at most 1e-8, and fewer than 100 evaluations of f missed that: they are counted by f
itself, as the library makes them. Libraries whose tolerance is absolute get 1e-8 ||z*||. Each solver is compiled once, and
solves one problem at a time. A library that is not installed is left out.

The models are taken at their first step and after some steps of training without regularization, float32, tolerance 1e-3
and 30 evaluations for each sample of one batch.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np

from benchmarks import tables, turns
from benchmarks.battery_problems import FAMILY, Problem, battery, evaluate, residual

TOL, LIMIT = 1e-8, 100
MODEL_TOL, MODEL_LIMIT = 1e-3, 30
MODELS = {
    "DEQ-Transformer, {} steps": ("configs/wt103.py:tiny", {"optimizer.learning_rate": 2e-3}, (0, 100, 200)),
    "multiscale DEQ, {} steps": ("configs/digits.py", {}, (0, 100, 200)),
}
"""Name -> config, changes to it, and the numbers of training steps after which it is solved."""

Solve = Callable[[Problem, float], np.ndarray]
"""(problem, tolerance for ||f(z) - z||) -> the returned z. It evaluates f by `Counter`."""


class Counter:
    """Counts the z at which f has been evaluated and missed the tolerance; a compiler merges two evaluations at the same z."""

    def __init__(self):
        self.missed: set[bytes] = set()

    def see(self, z: Any, fz: Any) -> None:
        with np.errstate(all="ignore"):
            z, fz = np.asarray(z), np.asarray(fz)
            if not np.linalg.norm(fz - z) <= TOL * np.linalg.norm(fz):
                self.missed.add(z.tobytes())


COUNTER = Counter()


def ours() -> dict[str, Any]:
    """Our solvers and options."""
    from deq_flax import Anderson, Broyden, Picard

    exact: dict[str, Any] = {"tol": 0.9 * TOL, "max_steps": LIMIT}
    return {
        "Broyden()": Broyden(**exact),
        "Broyden(line_search=True)": Broyden(**exact, line_search=True),
        "Broyden(memory=20)": Broyden(**exact, memory=20),
        "Broyden(memory=10)": Broyden(**exact, memory=10),
        "Broyden(memory=6)": Broyden(**exact, memory=6),
        "Broyden(history_dtype='bfloat16')": Broyden(**exact, history_dtype="bfloat16"),
        "Anderson(memory=10, restart=True)": Anderson(**exact, memory=10, restart=True),
        "Anderson(memory=10)": Anderson(**exact, memory=10),
        "Anderson(memory=6, restart=True)": Anderson(**exact, restart=True),
        "Anderson(memory=6)": Anderson(**exact),
        "Picard()": Picard(**exact),
        "Picard(adaptive=True)": Picard(**exact, adaptive=True),
        "Picard(relaxation=0.5)": Picard(**exact, relaxation=0.5),
    }


def jax_solve(run: Callable[[Callable, Any, Any], Any]) -> Solve:
    """`run(f, z0, tolerance)` as a `Solve`, compiled once."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def program(p: dict, tolerance: Any) -> Any:
        def f(z: Any) -> Any:
            fz = evaluate(jnp, p, z)
            jax.debug.callback(COUNTER.see, z, fz)
            return fz

        return run(f, p["start"], tolerance)

    def solve(p: Problem, tolerance: float) -> np.ndarray:
        z = np.asarray(jax.block_until_ready(program(p, tolerance)))
        jax.effects_barrier()
        return z

    return solve


def deq_flax_solvers() -> Iterator[tuple[str, Solve]]:
    from deq_flax import fixed_point

    for name, solver in ours().items():
        yield name, jax_solve(lambda f, z, tol, solver=solver: fixed_point(f, z, solver=solver, batched=False).value)


def jaxopt_solvers() -> Iterator[tuple[str, Solve]]:
    import jaxopt

    def root(**options: Any) -> Callable:
        # The sign for which its first estimate of the Jacobian, the identity, is right where f is constant.
        return lambda f, z, tol: jaxopt.Broyden(lambda z: z - f(z), maxiter=LIMIT - 1, tol=tol, **options).run(z).params

    def anderson(size: int) -> Callable:
        return lambda f, z, tol: jaxopt.AndersonAcceleration(f, history_size=size, maxiter=LIMIT - 1, tol=tol).run(z).params

    yield "Broyden, unit steps", jax_solve(root(stepsize=1.0, history_size=LIMIT))
    yield "Broyden, unit steps, memory 10", jax_solve(root(stepsize=1.0, history_size=10))
    yield "Broyden, line search", jax_solve(root(history_size=LIMIT))
    yield "Anderson, memory 5", jax_solve(anderson(5))
    yield "Anderson, memory 10", jax_solve(anderson(10))
    yield (
        "FixedPointIteration",
        jax_solve(lambda f, z, tol: jaxopt.FixedPointIteration(f, maxiter=LIMIT, tol=tol).run(z).params),
    )


def optimistix_solvers() -> Iterator[tuple[str, Solve]]:
    import optimistix as optx

    # It compares every element's last change with atol + rtol |z|.
    def run(solver: Callable, root: bool = False) -> Callable:
        def solve(f: Callable, z: Any, tol: Any) -> Any:
            find = optx.root_find if root else optx.fixed_point
            g = (lambda z, _: f(z) - z) if root else (lambda z, _: f(z))
            return find(g, solver(rtol=1e-10, atol=1e-3 * tol), z, max_steps=LIMIT, throw=False).value

        return solve

    yield "FixedPointIteration", jax_solve(run(optx.FixedPointIteration))
    yield "Newton (a dense Jacobian each step)", jax_solve(run(optx.Newton, root=True))
    yield "Dogleg (a dense Jacobian each step)", jax_solve(run(optx.Dogleg, root=True))


def banax_solvers() -> Iterator[tuple[str, Solve]]:
    import banax.adjoint
    import banax.solver

    limits = {"rtol": 0.9 * TOL, "atol": 0.0, "max_steps": LIMIT - 1}

    def run(solver: Any) -> Callable:
        return lambda f, z, tol: banax.adjoint.Implicit(solver=solver, b_solver=solver)((lambda z: f(z), ()), z).value

    yield "Broyden", jax_solve(run(banax.solver.Broyden(history_size=LIMIT, **limits)))
    yield "Broyden, memory 10", jax_solve(run(banax.solver.Broyden(history_size=10, **limits)))
    yield "Anderson, depth 6", jax_solve(run(banax.solver.Anderson(depth=6, **limits)))
    yield "Anderson, depth 10", jax_solve(run(banax.solver.Anderson(depth=10, **limits)))
    yield "Picard", jax_solve(run(banax.solver.Picard(**limits)))


def torchdeq_solvers() -> Iterator[tuple[str, Solve]]:
    import torch
    from torchdeq.solver.anderson import anderson_solver
    from torchdeq.solver.broyden import broyden_solver
    from torchdeq.solver.fp_iter import fixed_point_iter

    torch.set_num_threads(1)

    def run(solver: Callable, **options: Any) -> Solve:
        options |= {"max_iter": LIMIT - 1, "tol": 0.9 * TOL, "stop_mode": "rel"}

        def solve(p: Problem, tolerance: float) -> np.ndarray:
            tensors = {key: torch.from_numpy(np.asarray(value)) for key, value in p.items()}

            def f(z: Any) -> Any:
                fz = evaluate(torch, tensors, z)
                COUNTER.see(z, fz)
                return fz

            try:
                with torch.no_grad():
                    return solver(f, tensors["start"][None], **options)[0][0].numpy()
            except torch.linalg.LinAlgError:
                return p["start"]

        return solve

    yield "Broyden", run(broyden_solver)
    yield "Broyden, line search", run(broyden_solver, ls=True)
    yield "Broyden, memory 10", run(broyden_solver, LBFGS_thres=10)
    yield "Anderson, memory 6", run(anderson_solver, m=6)
    yield "Anderson, memory 10", run(anderson_solver, m=10)
    yield "fixed_point_iter", run(fixed_point_iter)


def scipy_solvers() -> Iterator[tuple[str, Solve]]:
    from scipy import optimize

    def run(method: str, options: Callable[[float], dict]) -> Solve:
        def solve(p: Problem, tolerance: float) -> np.ndarray:
            def g(z: np.ndarray) -> np.ndarray:
                fz = evaluate(np, p, z)
                COUNTER.see(z, fz)
                return fz - z

            try:
                with np.errstate(all="ignore"):
                    return optimize.root(g, p["start"], method=method, options=options(tolerance)).x
            except (ValueError, OverflowError, np.linalg.LinAlgError):  # it meets a value that is not finite
                return p["start"]

        return solve

    inexact = lambda tol: {"fatol": tol, "tol_norm": np.linalg.norm, "maxiter": LIMIT}  # noqa: E731
    yield "broyden1", run("broyden1", inexact)
    yield "anderson", run("anderson", inexact)
    yield "krylov", run("krylov", inexact)
    yield "df-sane", run("df-sane", lambda tol: {"fatol": tol, "ftol": 0.0, "maxfev": LIMIT})
    yield "hybr (a Jacobian by differences)", run("hybr", lambda tol: {"xtol": 1e-12, "maxfev": LIMIT})


def count(solve: Solve, problems: list[Problem], sizes: list[float]) -> list[int | None]:
    """Evaluations by problem, None where it is not solved."""
    found: list[int | None] = []
    for p, size in zip(problems, sizes, strict=True):
        COUNTER.missed.clear()
        z = solve(p, 0.9 * TOL * size)
        solved = np.isfinite(z).all() and residual(p, z) <= TOL and len(COUNTER.missed) < LIMIT
        found.append(len(COUNTER.missed) + 1 if solved else None)
    return found


MAKERS = {
    "deq_flax": deq_flax_solvers,
    "jaxopt": jaxopt_solvers,
    "optimistix": optimistix_solvers,
    "banax": banax_solvers,
    "torchdeq": torchdeq_solvers,
    "scipy": scipy_solvers,
}
"""Library -> its solvers; the name is that of its distribution, too, but for ours."""


def installed() -> list[str]:
    """The libraries that are here."""
    found = ["deq_flax"]
    for library in list(MAKERS)[1:]:
        try:
            importlib.metadata.version(library)
            found.append(library)
        except importlib.metadata.PackageNotFoundError:
            print(f"{library}: not installed, left out", file=sys.stderr)
    return found


def battery_tables(names: list[str], seed: int) -> str:
    """Solved and evaluations of every solver of these libraries, and of ours by family."""
    families = battery(seed)
    everything = [p for family in families.values() for p in family]
    sizes = [1.0] * len(everything)
    rows, by_family = [], {}
    for library in names:
        for name, solve in MAKERS[library]():
            found = count(solve, everything, sizes)
            if not rows:  # the first, of ours, has a relative tolerance, and tells the sizes of the solutions
                sizes = [float(np.linalg.norm(solve(p, 0.0))) for p in everything]
            solved = [n for n in found if n is not None]
            rows.append(
                [library, name, str(len(solved)), f"{median(solved):.0f}", f"{sum(n or LIMIT for n in found) / 400:.1f}"]
            )
            print(*rows[-1], file=sys.stderr)
            if library == "deq_flax":
                by_family[name] = [sum(n is not None for n in found[i : i + FAMILY]) for i in range(0, len(found), FAMILY)]
    text = f"Seed {seed}. Solved of 400; median evaluations of those; mean evaluations of all, 100 if not solved.\n\n"
    text += tables.markdown(["library", "solver", "solved", "median", "mean of all"], rows)
    shown = [name for name in by_family if "20" not in name]
    text += "\nSolved of 20, by family:\n\n"
    return text + tables.markdown(
        ["family", *shown], [[family, *(str(by_family[name][i]) for name in shown)] for i, family in enumerate(families)]
    )


def model_table() -> str:
    """Solved samples and evaluations of our solvers on models, at their first step and later."""
    from deq_flax import Anderson, Broyden, Picard

    limits: dict[str, Any] = {"tol": MODEL_TOL, "max_steps": MODEL_LIMIT}
    solvers = {
        "Broyden()": Broyden(**limits),
        "Broyden(memory=10)": Broyden(**limits, memory=10),
        "Broyden(line_search=True)": Broyden(**limits, line_search=True),
        "Anderson(memory=6, restart=True)": Anderson(**limits, restart=True),
        "Anderson(memory=6)": Anderson(**limits),
        "Anderson(memory=10, restart=True)": Anderson(**limits, memory=10, restart=True),
        "Anderson(memory=10)": Anderson(**limits, memory=10),
        "Picard()": Picard(**limits),
        "Picard(adaptive=True)": Picard(**limits, adaptive=True),
        "Picard(relaxation=0.5)": Picard(**limits, relaxation=0.5),
    }
    columns, cells = [], {name: [] for name in solvers}
    for model, (config, changes, stops) in MODELS.items():
        for stop, equation in zip(stops, equations(config, changes, stops), strict=True):
            columns.append(model.format(stop))
            for name, solver in solvers.items():
                steps, residuals = equation(solver)
                solved = residuals <= MODEL_TOL
                cells[name].append(
                    f"{solved.mean():.0%}, {np.where(solved, steps + 1, MODEL_LIMIT).mean():.1f}, {np.median(residuals):.0e}"
                )
                print(columns[-1], name, cells[name][-1], file=sys.stderr)
    text = f"Share of samples that reach {MODEL_TOL} in {MODEL_LIMIT} evaluations; mean evaluations; median residual.\n\n"
    return text + tables.markdown(["solver", *columns], [[name, *row] for name, row in cells.items()])


def equations(
    config: str, changes: dict[str, Any], stops: tuple[int, ...]
) -> Iterator[Callable[[Any], tuple[np.ndarray, np.ndarray]]]:
    """For each number of steps, a function from a solver to the steps and measured residuals, (B,), of the model's equation.

    Training is that of the config without a Jacobian loss, with Broyden's method both ways.
    """
    import jax
    from flax import nnx

    from benchmarks.training import Training, resolved
    from deq_flax import fixed_point
    from deq_flax.train.step import split_model

    plain = {"deq.solver": "broyden", "deq.jacobian_weight": 0.0, "deq.pretrain_steps": 0, "optimizer.warmup_steps": 20}
    limits = {"deq.max_steps": MODEL_LIMIT, "deq.backward_max_steps": MODEL_LIMIT}
    it = Training(resolved(config, plain | limits | changes))
    graph, *_ = split_model(it.run.model)

    @jax.jit
    def norms(params: Any, variables: Any, z: Any) -> Any:
        f, _ = it.equation(nnx.merge(graph, params, variables, copy=True))
        square = lambda tree: sum(  # noqa: E731
            (leaf.astype("float32") ** 2).reshape(leaf.shape[0], -1).sum(1) for leaf in jax.tree.leaves(tree)
        )
        fz = f(z)
        return square(jax.tree.map(lambda a, b: a - b, fz, z)), square(fz)

    def solve(solver: Any) -> tuple[np.ndarray, np.ndarray]:
        @jax.jit
        def run(params: Any, variables: Any) -> Any:
            f, z0 = it.equation(nnx.merge(graph, params, variables, copy=True))
            return fixed_point(f, z0, solver=solver)

        solution = run(it.run.state.params, it.run.state.variables)
        change, size = norms(it.run.state.params, it.run.state.variables, solution.value)
        return np.asarray(solution.stats.steps), np.sqrt(np.asarray(change) / np.asarray(size))

    batches, done = it.task.train_batches(0), 0
    for stop in stops:
        while done < stop:
            batch, phase, scalars = next(batches), it.phases.phase(done), it.phases.scalars(done)
            it.run.state, _ = it.run.train_step(it.run.state, batch, scalars, np.int32(done), phase=phase)
            done += 1
        yield solve


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the problems; our options were chosen on seed 0 (1)")
    arguments = parser.parse_args()
    names, jax = installed(), importlib.import_module("jax")
    # Not by a context: callbacks run in threads of their own, where they would round what they are given to float32.
    jax.config.update("jax_enable_x64", True)
    text = battery_tables(names, arguments.seed)
    jax.config.update("jax_enable_x64", False)
    tables.publish("battery", f"{turns.machine(['jax', *names[1:]])}. {text}", arguments.write)
    tables.publish("battery of models", f"{turns.machine(['jax'])}. {model_table()}", arguments.write)


if __name__ == "__main__":
    main()
