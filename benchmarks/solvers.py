"""Solvers and gradients, side by side with other libraries.

    pip install -r requirements.txt -r requirements-bench.txt
    python -m benchmarks.solvers [--rounds 9] [--mode bfloat16] [--write]

Every library makes the same number of evaluations of the same layer (tolerance 0); their calls of f are
counted, and overhead = time / (calls x time of f alone in a loop). A library that is not installed is left out.

What a higher limit costs: f costs nothing, and nothing converges; so the time of an evaluation is the solver's own, and must
not depend on the limit if the history is bounded (it does when XLA copies the history in every step).
"""

from collections.abc import Callable
from typing import Any

from benchmarks import tables, turns

STEPS = 30
LIBRARIES = {"deq_flax": "jax", "banax": "banax", "jaxopt": "jaxopt", "optimistix": "optimistix", "torchdeq": "torchdeq"}
"""Library -> the distribution that must be installed."""
CASES = ("f", "vjp", "picard", "anderson", "broyden", "gradient", "idle anderson", "idle broyden")
"""'idle' is f(z) = a z + x with a diagonal a, which costs nothing: the solver's own time. 'gradient' is Anderson forward and
Broyden adjoint."""
LIMITS = (10, 20, 40, 80)
BOUNDED = ("Picard", "Anderson(memory=6)", "Broyden(memory=10)", "Broyden()")
"""Solvers of ours that run at all LIMITS; the last keeps as many pairs as steps."""


def jax_cases(library: str, dtype: str) -> tuple[dict[str, Callable], dict[str, int]]:
    """Compiled programs by case, and how often each calls f (the gradient: f, and separately its adjoint)."""
    import jax
    import jax.numpy as jnp

    from benchmarks.layer import jax_layer, weights

    w = {name: jnp.asarray(value, dtype) for name, value in weights().items()}
    z0 = jnp.zeros((*w["x"].shape[:2], w["out"].shape[0]), dtype)
    calls = {"n": 0}

    def counted(f):
        def g(w, z):
            jax.debug.callback(lambda: calls.__setitem__("n", calls["n"] + 1))
            return f(w, z)

        return g

    def idle(w, z):
        return jnp.linspace(-0.9, 0.9, z.shape[-1], dtype=dtype)[None, None] * z + w["x"][..., : z.shape[-1]]

    solve = JAX_SOLVES[library]
    programs, counts = {}, {}
    for case in ("picard", "anderson", "broyden", "idle anderson", "idle broyden"):
        f = idle if case.startswith("idle") else jax_layer
        run = solve(case.removeprefix("idle "))
        if run is None:
            continue
        jax.block_until_ready(jax.jit(lambda w, z, run=run, f=f: run(counted(f), w, z))(w, z0))
        jax.effects_barrier()
        counts[case], calls["n"] = calls["n"], 0
        programs[case] = bind(jax.jit(lambda w, z, run=run, f=f: run(f, w, z)), w, z0)
    run = solve("gradient")
    if run is not None:
        programs["gradient"] = bind(jax.jit(jax.grad(lambda w, z: jnp.sum(jnp.sin(run(jax_layer, w, z))))), w, z0)
    if library == "deq_flax":

        def repeated(w, z):
            return jax.lax.fori_loop(0, STEPS, lambda _, z: jax_layer(w, z), z)

        def repeated_vjp(w, z):
            _, pullback = jax.vjp(lambda z: jax_layer(w, z), z)
            return jax.lax.fori_loop(0, STEPS, lambda _, v: pullback(v)[0], jnp.ones_like(z))

        programs |= {"f": bind(jax.jit(repeated), w, z0), "vjp": bind(jax.jit(repeated_vjp), w, z0)}
    return programs, counts


def bind(program: Callable, *arguments) -> Callable:
    import jax

    return lambda: jax.block_until_ready(program(*arguments))


def ours(case: str) -> Callable:
    from deq_flax import Anderson, Broyden, Implicit, Picard, fixed_point

    exact: dict[str, Any] = {"tol": 0.0, "max_steps": STEPS}
    solver = {"picard": Picard(**exact), "broyden": Broyden(**exact)}.get(case, Anderson(**exact))
    gradient = Implicit(Broyden(**exact))
    return lambda f, w, z: fixed_point(lambda z: f(w, z), z, solver=solver, gradient=gradient).value


def banax(case: str) -> Callable:
    import banax.adjoint
    import banax.solver

    limits = {"rtol": 0.0, "atol": 0.0, "max_steps": STEPS - 1}
    anderson = banax.solver.Anderson(depth=6, **limits)
    broyden = banax.solver.Broyden(history_size=STEPS, **limits)
    solver = {"picard": banax.solver.Picard(**limits), "broyden": broyden}.get(case, anderson)
    adjoint = banax.adjoint.Implicit(solver=solver, b_solver=broyden)
    return lambda f, w, z: adjoint((lambda z, w: f(w, z), (w,)), z).value


def jaxopt(case: str) -> Callable | None:
    import jaxopt

    limits = {"maxiter": STEPS, "tol": 0.0}
    if case == "gradient":
        return None  # its implicit gradient solves to a tolerance of its own: another number of evaluations
    if case == "picard":
        return lambda f, w, z: jaxopt.FixedPointIteration(lambda z, w: f(w, z), **limits).run(z, w).params
    limits["history_size"] = 6 if case == "anderson" else STEPS
    if case == "broyden":
        return lambda f, w, z: jaxopt.Broyden(lambda z, w: f(w, z) - z, stepsize=1.0, **limits).run(z, w).params
    return lambda f, w, z: jaxopt.AndersonAcceleration(lambda z, w: f(w, z), **limits).run(z, w).params


def optimistix(case: str) -> Callable | None:
    if case != "picard":
        return None  # it has neither of the others
    import optimistix as optx

    solver = optx.FixedPointIteration(rtol=0.0, atol=0.0)
    return lambda f, w, z: optx.fixed_point(lambda z, w: f(w, z), solver, z, w, max_steps=STEPS, throw=False).value


JAX_SOLVES = {"deq_flax": ours, "banax": banax, "jaxopt": jaxopt, "optimistix": optimistix}


def torch_cases() -> tuple[dict[str, Callable], dict[str, int]]:
    import torch
    import torchdeq

    from benchmarks.layer import torch_layer, weights

    torch.set_num_threads(turns.THREADS)
    w = {name: torch.tensor(value, requires_grad=True) for name, value in weights().items()}
    z0 = torch.zeros(*w["x"].shape[:2], w["out"].shape[0])
    calls = {"n": 0}

    def layer(z):
        calls["n"] += 1
        return torch_layer(w, z)

    def idle(z):
        calls["n"] += 1
        return torch.linspace(-0.9, 0.9, z.shape[-1]) * z + w["x"][..., : z.shape[-1]]

    def deq(solver: str, limit: int):
        # Its Broyden makes one call more than its limit.
        options = dict(f_max_iter=limit, f_tol=0.0, b_solver="broyden", b_max_iter=STEPS - 1, b_tol=0.0, f_stop_mode="rel")
        return torchdeq.get_deq(f_solver=solver, ift=True, **options)

    def forward(solver: str, f: Callable, limit: int) -> Callable:
        solve = deq(solver, limit).eval()

        def run():
            with torch.no_grad():
                solve(f, z0)

        return run

    def repeated():
        with torch.no_grad():
            z = z0
            for _ in range(STEPS):
                z = torch_layer(w, z)

    def repeated_vjp():
        z = z0.clone().requires_grad_()
        y, v = torch_layer(w, z), torch.ones_like(z0)
        for _ in range(STEPS):
            (v,) = torch.autograd.grad(y, z, v, retain_graph=True)

    def gradient():
        for value in w.values():
            value.grad = None
        z, _ = training(layer, z0)
        torch.sin(z[-1]).sum().backward()

    training = deq("anderson", STEPS).train()
    programs = {
        "f": repeated,
        "vjp": repeated_vjp,
        "picard": forward("fixed_point_iter", layer, STEPS),
        "anderson": forward("anderson", layer, STEPS),
        "broyden": forward("broyden", layer, STEPS - 1),
        "gradient": gradient,
        "idle anderson": forward("anderson", idle, STEPS),
        "idle broyden": forward("broyden", idle, STEPS - 1),
    }
    counts = {}
    for case, program in programs.items():
        calls["n"] = 0
        program()
        counts[case] = calls["n"]
    return programs, counts


def cases_by_limit(dtype: str) -> dict[str, Callable]:
    """Programs of our solvers on a free f of state (4, 16384)."""
    import jax
    import jax.numpy as jnp

    from deq_flax import Anderson, Broyden, Picard, fixed_point

    z0 = jnp.zeros((4, 64 * 256), dtype)
    a = jnp.linspace(-0.99, 0.99, z0.shape[1], dtype=dtype)[None]

    def program(name: str, limit: int) -> Callable:
        solver = {"Picard": Picard, "Anderson(memory=6)": Anderson}.get(name, Broyden)(tol=0.0, max_steps=limit)
        if name == "Broyden(memory=10)":
            solver = Broyden(tol=0.0, max_steps=limit, memory=10)
        return bind(jax.jit(lambda z: fixed_point(lambda z: a * z + 1, z, solver=solver).value), z0)

    return {f"{name}, {limit}": program(name, limit) for name in BOUNDED for limit in LIMITS}


def programs(library: str, dtype: str) -> tuple[dict[str, Callable], dict[str, int]]:
    programs, counts = torch_cases() if library == "torchdeq" else jax_cases(library, dtype)
    return programs | (cases_by_limit(dtype) if library == "deq_flax" else {}), counts


def table(times: turns.Times, facts: turns.Facts) -> str:
    rows = []
    for case in CASES:
        n = {name: f" ({told[case]})" if told.get(case) else "" for name, told in facts.items()}
        cells = [f"{1e3 * times[name, case]:.1f}{n[name]}" if (name, case) in times else "" for name in facts]
        rows.append([case, *cells])
    text = "Milliseconds of one call (calls of f in brackets; medians).\n\n" + tables.markdown(["case", *facts], rows)
    with_f = [name for name in facts if (name, "f") in times]
    rows = []
    for case in ("picard", "anderson", "broyden", "gradient"):
        cells = []
        for name in with_f:
            limit = times[name, "f"] / STEPS * facts[name].get(case, STEPS)
            if case == "gradient":
                limit = times[name, "f"] + times[name, "vjp"]
            cells.append(f"{times[name, case] / limit:.2f}")
        rows.append([case, *cells])
    text += f"\nOverhead: time / (calls x the library's own f in a loop); gradient: / ({STEPS} f + {STEPS} vjp).\n\n"
    text += tables.markdown(["case", *with_f], rows)
    microseconds = {key: [1e6 * times["deq_flax", f"{key}, {limit}"] / limit for limit in LIMITS] for key in BOUNDED}
    text += "\nMicroseconds of our solvers for one evaluation that costs nothing, state (4, 16384), by the limit:\n\n"
    return text + tables.markdown(
        ["solver", *map(str, LIMITS)], [[key, *(f"{value:.0f}" for value in values)] for key, values in microseconds.items()]
    )


if __name__ == "__main__":
    cases = (*CASES, *(f"{name}, {limit}" for name in BOUNDED for limit in LIMITS))
    turns.command("solvers", __file__, __doc__, libraries=LIBRARIES, cases=cases, programs=programs, table=table)
