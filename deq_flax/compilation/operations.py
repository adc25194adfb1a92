"""Floating-point operations of a program's matrix products and convolutions, by part, counted before it is compiled."""

import math
from collections import defaultdict
from typing import Any

import jax

from deq_flax.compilation.program import is_usual, loop_name


def operations_by_part(jaxpr: Any) -> dict[str, float]:
    """Count the operations of one iteration of each solver's loop, and those outside; named as in `program.Part`.

    Products that a solver takes with its history are overhead and do not count. Of the branches of a conditional the cheapest
    counts, as a cluster of rare words is skipped in most batches; the dearest where the program says that it is the usual one.
    """
    counts: dict[str, float] = defaultdict(float)
    _count(jaxpr, counts, "outside", "", 1.0)
    return {"outside": 0.0} | counts


def _count(jaxpr: Any, counts: dict[str, float], part: str, path: str, times: float, fixed: set[Any] | None = None) -> None:
    """Add the operations of a program to its parts.

    `fixed`: within a loop, the variables that do not change from one iteration to the next. What depends on them alone is
    computed once, before the loop. None: outside of loops.
    """
    for equation in jaxpr.eqns:
        if fixed is not None and all(_is_fixed(v, fixed) for v in equation.invars):
            fixed.update(equation.outvars)
            continue
        name, params = equation.primitive.name, equation.params
        here = f"{path}/{equation.source_info.name_stack}"
        if name == "dot_general" and not _of_solver(equation):
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            counts[part] += times * 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name in ("conv_general_dilated", "convolution_nhwc"):
            counts[part] += times * _convolution(equation)
        elif name == "cond":
            branches = [operations_by_part(_program(branch)) for branch in params["branches"]]
            choose = max if is_usual(here) else min
            for inner, count in choose(branches, key=lambda found: sum(found.values())).items():
                counts[part if inner == "outside" else inner] += times * count
        elif name == "while":
            body, within, trips = _program(params["body_jaxpr"]), part != "outside", _trips(params)
            start = params["cond_nconsts"]
            constants = zip(body.invars, equation.invars[start : start + params["body_nconsts"]], strict=False)
            constant = {v for v, outer in constants if not within or _is_fixed(outer, fixed or set())}
            loop = part if within or trips else loop_name(f"{here}/while")
            _count(body, counts, loop, f"{here}/while", times * (trips or 1), constant | {*body.constvars})
        elif name == "custom_linear_solve":  # which also holds the programs of its derivatives
            _count(_program(params["jaxprs"].solve), counts, part, here, times)
        else:
            times_inner = times * params["length"] if name == "scan" else times
            for inner in _programs(equation):
                constant = None
                if fixed is not None:
                    same = len(inner.invars) == len(equation.invars)
                    pairs = zip(inner.invars, equation.invars, strict=True) if same else ()
                    constant = {*inner.constvars, *(v for v, outer in pairs if _is_fixed(outer, fixed))}
                _count(inner, counts, part, here, times_inner, constant)


def _trips(params: Any) -> int:
    """Number of iterations of a loop that counts from 0 to below a constant; 0 where it depends on data."""
    condition = _program(params["cond_jaxpr"])
    bounds = [e.invars[1] for e in condition.eqns if e.primitive.name == "lt"] if len(condition.eqns) == 1 else []
    return int(bounds[0].val) if bounds and hasattr(bounds[0], "val") else 0


def _is_fixed(variable: Any, fixed: set[Any]) -> bool:
    return hasattr(variable, "val") or variable in fixed  # a literal has a value


def _programs(equation: Any) -> list[Any]:
    """The programs within an equation."""
    params = equation.params
    if equation.primitive.name == "call_hi_primitive":  # jax 0.12 has these for a custom_root and its linear map
        primitive = params["_prim"]
        shapes = jax.tree.unflatten(primitive.in_tree, [v.aval for v in equation.invars])
        return [jax.make_jaxpr(primitive.expand)(*shapes).jaxpr]
    return [_program(x) for x in jax.tree.leaves(params, is_leaf=_is_program) if _is_program(x)]


def _of_solver(equation: Any) -> bool:
    traceback = equation.source_info.traceback
    files = [] if traceback is None else [frame.file_name for frame in traceback.frames]
    ours = next((file for file in files if "/deq_flax/" in file), "")
    return "/equilibrium/solvers/" in ours


def _convolution(equation: Any) -> float:
    """Operations of a convolution: for each element of the result, the kernel's spatial size times its input channels."""
    (_, kernel), out = (v.aval.shape for v in equation.invars[:2]), equation.outvars[0].aval.shape
    numbers = equation.params.get("dimension_numbers")
    outputs = kernel[-1] if numbers is None else kernel[numbers.rhs_spec[0]]
    # The transposes of a strided convolution dilate its operands with zeros, which are not counted.
    dilation = math.prod(equation.params["lhs_dilation"] if numbers else equation.params["window"].x_dilation)
    return 2 * math.prod(out) * math.prod(kernel) / outputs / dilation


def _program(x: Any) -> Any:
    return getattr(x, "jaxpr", x)


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")
