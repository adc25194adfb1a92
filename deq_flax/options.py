"""Options as dataclasses: from a mapping, or from command-line text, to a checked object.

Every section of a config and every solver and gradient that a config names is a frozen dataclass. Its fields are the known
names, their annotations the types, and the string below a field is its documentation.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from deq_flax.errors import UserError

Options = TypeVar("Options")

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
_NOUNS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}


class UnknownKeyError(UserError):
    """A config has no section or key of this name."""


def make(cls: type[Options], values: Mapping[str, Any], where: str, **given: Any) -> Options:
    """An instance of the dataclass `cls` from `values`; what is absent takes its default.

    Args:
      cls: a dataclass.
      values: option name -> value. An int is accepted for a float, a list for a tuple.
      where: the place of the options in a config, such as 'train', for messages.
      given: options that the caller decides: they are passed on as they are, and `values` may not hold them.

    Raises:
      UserError: a key is unknown (the nearest known one is named), missing, or of another type, or the class refuses a value.
    """
    hints = {name: hint for name, hint in hints_of(cls).items() if name not in given}
    for name in values:
        require_known(name, hints, where)
    for field in dataclasses.fields(cls):  # ty: ignore[invalid-argument-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name in hints and field.name not in values:
            raise UserError(f"{where}.{field.name} is missing from the config")
    checked = {name: _fit(value, hints[name], f"{where}.{name}") for name, value in values.items()}
    try:
        return cls(**checked, **given)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def parse(text: str, hint: Any, where: str) -> Any:
    """Parse command-line text by the type of its option. UserError: it is no value of that type."""
    if hint is str or _choices(hint):
        return text
    if hint is bool:
        if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
    elif hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            pass
    elif typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        parts = text.strip().removeprefix("(").removesuffix(")").strip().strip(",")
        return tuple(parse(part.strip().strip("'\""), inner, where) for part in parts.split(",")) if parts else ()
    else:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    raise UserError(f"{where} must be {_noun(hint)}, not {text!r}")


def hints_of(cls: Any) -> dict[str, Any]:
    """The types of the options that `cls` takes, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def docs_of(cls: type) -> dict[str, str]:
    """The documentation of every option by name: the string literal below the field, on one line.

    `{TABLE}` in it stands for the names in the table TABLE of the module that defines the field.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is object or not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        name = None
        for statement in definition.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
            elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                docs[name] = re.sub(r"{(\w+)}", partial(_names, base), " ".join(str(statement.value.value).split()))
                name = None
            else:
                name = None
    return docs


def _names(cls: type, table: re.Match[str]) -> str:
    """The names in a table of the module of `cls`: 'a, b or c'."""
    *names, last = vars(sys.modules[cls.__module__])[table[1]]
    return f"{', '.join(names)} or {last}" if names else last


def require_known(name: str, known: Iterable[str], where: str) -> None:
    """Raise UnknownKeyError unless `name` is among the known names of the options at `where`."""
    if name not in (known := list(known)):
        raise UnknownKeyError(f"{where} has no key {name!r}{suggestion(name, known)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def choose(table: Mapping[str, Options], name: str, what: str) -> Options:
    """The entry of a table. UserError: there is none of that name; the message lists the known ones."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return str(value).replace(" ", "") if isinstance(value, Mapping) else str(value)


def _fit(value: Any, hint: Any, where: str) -> Any:
    """The value in the type of its option."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return None if value is None else _fit(value, inner[0], where)
    choices = _choices(hint)
    if choices:
        if value not in choices:
            raise UserError(f"unknown {where} {value!r}; known: {', '.join(map(str, choices))}")
        return value
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise UserError(f"{where} must be {len(inner)} numbers, not {shown(tuple(value)) or 'none'}")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_fit(element, kind, where) for element, kind in zip(value, kinds, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return dict(value)
    raise UserError(f"{where} must be {_noun(hint)}, not {value!r}")


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _noun(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        count = "any number of" if inner[-1] is Ellipsis else str(len(inner))
        return f"{count} values with commas between them"
    return _NOUNS.get(hint, "a mapping of names to values")
