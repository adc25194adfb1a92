"""Floating-point operations of a program's matrix products and convolutions, by part, counted before it is compiled."""

import math
from collections import defaultdict
from typing import Any

import jax

from deq_flax.compilation.program import loop_name


def operations_by_part(jaxpr: Any) -> dict[str, float]:
    """Count the operations of one iteration of each solver's loop, and those outside; names as of `program.Part`.

    The solver's own products, of its history, are overhead and do not count. Of the branches of a conditional the cheapest
    counts: a cluster of rare words is skipped in most batches.
    """
    counts: dict[str, float] = defaultdict(float)
    _count(jaxpr, counts, "outside", "", 1.0)
    return {"outside": 0.0} | counts


def _count(jaxpr: Any, counts: dict[str, float], part: str, path: str, times: float) -> None:
    for equation in jaxpr.eqns:
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
            for inner, count in min(branches, key=lambda found: sum(found.values())).items():
                counts[part if inner == "outside" else inner] += times * count
        elif name == "while":
            loop = loop_name(f"{here}/while")
            _count(_program(params["body_jaxpr"]), counts, part if times > 1 else loop, f"{here}/while", times)
        elif name == "custom_linear_solve":  # which also holds the programs of its derivatives
            _count(_program(params["jaxprs"].solve), counts, part, here, times)
        else:
            times_inner = times * params["length"] if name == "scan" else times
            for inner in filter(_is_program, jax.tree.leaves(params, is_leaf=_is_program)):
                _count(_program(inner), counts, part, here, times_inner)


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
