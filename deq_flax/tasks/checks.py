"""Values of a config that no task can work with."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from deq_flax.errors import UserError


def check_least(data: Mapping[str, Any], least: int, *names: str) -> None:
    """UserError when one of these keys of the section `data` is below `least`."""
    for name in names:
        if data[name] < least:
            raise UserError(f"data.{name} must be at least {least}, not {data[name]}")


def check_model(build: Callable[[nnx.Rngs], nnx.Module]) -> None:
    """UserError when there is no such model: its shapes are built, which is where bad values show, without allocating it."""
    try:
        nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"section model: {error}") from error
