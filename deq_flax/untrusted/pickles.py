"""Read pickles of plain data, without the package that could run what they ask for.

A pickle is a program. `pickle.Unpickler` runs it in C, where a nested key overflows the stack, and where it takes as much
memory as the program claims. This interpreter knows the instructions that build dictionaries, lists, tuples, numbers, text and
bytes. Functions that a pickle names are looked up in a table of the caller's; nothing is imported, and no object of another
class is made. Instructions, sizes of numbers, depth of keys and the elements that functions are given are bounded.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_INSTRUCTIONS = 1 << 20
"""Most instructions of one pickle: a tensor takes about 40, and a million take two seconds."""
MAX_BITS = 256
"""Most bits of an integer."""

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_IGNORED = {"PROTO", "FRAME"}


class PickleError(ValueError):
    """Raised for a pickle that is damaged, or that does something else than build plain data."""


class NameRefusedError(PickleError):
    """Raised for a pickle that names something which is not in the table."""

    def __init__(self, name: str):
        super().__init__(f"it refers to {name}")
        self.name = name


@dataclass(frozen=True)
class Named:
    """The stand-in that a pickle gets for a name."""

    value: Any
    """The table's entry."""


def unpickle(
    stream: io.BytesIO,
    table: Mapping[tuple[str, str], Any],
    *,
    persistent_load: Callable[[Any], Any] | None = None,
    encoding: str | None = None,
) -> Any:
    """The object of the pickle at the stream's position, which ends up behind it.

    Args:
      stream: the content of a file.
      table: the names that a pickle may use, (module, name) -> a function to be called, or a value. The arguments of all calls
        may have no more elements together than the stream has bytes.
      persistent_load: makes the object of a persistent reference. None: such a reference is refused.
      encoding: encoding of the byte strings of Python 2; None: they remain bytes.

    Raises:
      PickleError: the pickle is damaged or does something else. Functions of the table may raise other errors.
    """
    return _Machine(table, persistent_load, encoding, budget=stream.getbuffer().nbytes).run(stream)


class _Machine:
    def __init__(self, table: Mapping, persistent_load: Callable[[Any], Any] | None, encoding: str | None, budget: int):
        self._table, self._persistent_load, self._encoding, self._budget = table, persistent_load, encoding, budget
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if count >= MAX_INSTRUCTIONS:
                    raise PickleError(f"it has more than {MAX_INSTRUCTIONS} instructions")
                name = opcode.name
                if name in _LITERALS:
                    self._literal(argument)
                elif name == "STOP":
                    (value,) = self._stack
                    return value
                elif name not in _IGNORED:
                    instruction = _INSTRUCTIONS.get(name)
                    if instruction is None:
                        raise PickleError(f"it has an instruction that plain data does not need ({name})")
                    instruction(self, argument)
        except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            if isinstance(error, PickleError):
                raise
            raise PickleError("it is damaged or cut off") from error
        raise PickleError("it is cut off")

    def _literal(self, argument: Any) -> None:
        if type(argument) is int and argument.bit_length() > MAX_BITS:
            raise PickleError(f"it has an integer of {argument.bit_length()} bits")
        self._stack.append(argument)

    def _string(self, argument: str) -> None:
        raw = argument.encode("latin-1")
        self._stack.append(raw if self._encoding is None else raw.decode(self._encoding))

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _popped(self) -> list[Any]:
        """Take the values above the last mark off the stack, and return them."""
        place = self._marks.pop()
        items = self._stack[place:]
        del self._stack[place:]
        return items

    def _put(self, index: int) -> None:
        if not 0 <= int(index) <= MAX_INSTRUCTIONS:
            raise PickleError(f"it has an instruction that plain data does not need (LONG_BINPUT {index})")
        self._memo[int(index)] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[int(index)])

    def _tuple(self, n: int) -> None:
        items = tuple(self._stack[-n:])
        if len(items) < n:
            raise IndexError
        self._stack[-n:] = [items]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked(key)] = value

    def _dict(self, _: Any) -> None:
        items = self._popped()
        self._stack.append({})
        self._set(items)

    def _global(self, module: str, name: str) -> None:
        if (module, name) not in self._table:
            raise NameRefusedError(f"{module}.{name}")
        self._stack.append(Named(self._table[module, name]))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError
        self._global(module, name)

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Named) or not callable(function.value) or not isinstance(arguments, tuple):
            raise TypeError
        self._budget -= sum(len(x) for x in arguments if isinstance(x, str | bytes | tuple | list | dict))
        if self._budget < 0:
            raise PickleError("it copies more than it holds")
        self._stack.append(function.value(*arguments))

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        set_state = getattr(self._stack[-1], "__setstate__", None)
        if set_state is not None:
            set_state(state)
        elif not isinstance(self._stack[-1], dict):  # the attributes of a dictionary do not matter
            raise PickleError("it sets attributes on a name or a number")

    def _reference(self, _: Any) -> None:
        if self._persistent_load is None:
            raise PickleError("it refers to something outside of it")
        self._stack.append(self._persistent_load(self._stack.pop()))

    def _refused_name(self, argument: str) -> None:
        raise NameRefusedError(argument.replace(" ", "."))


def checked(key: Any) -> Any:
    """A key whose hash does not recurse: a number, text, bytes, None, or a tuple of these. PickleError: it is none."""
    plain = str | bytes | int | float | None
    if isinstance(key, plain) or (isinstance(key, tuple) and all(isinstance(part, plain) for part in key)):
        return key
    raise PickleError(f"it has a dictionary with a key that is neither text nor a number ({type(key).__name__})")


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_STRINGS, _Machine._string),
    "NONE": lambda self, _: self._stack.append(None),
    "NEWTRUE": lambda self, _: self._stack.append(True),
    "NEWFALSE": lambda self, _: self._stack.append(False),
    "MARK": _Machine._mark,
    "EMPTY_LIST": lambda self, _: self._stack.append([]),
    "EMPTY_TUPLE": lambda self, _: self._stack.append(()),
    "EMPTY_DICT": lambda self, _: self._stack.append({}),
    "LIST": lambda self, _: self._stack.append(self._popped()),
    "TUPLE": lambda self, _: self._stack.append(tuple(self._popped())),
    "TUPLE1": lambda self, _: self._tuple(1),
    "TUPLE2": lambda self, _: self._tuple(2),
    "TUPLE3": lambda self, _: self._tuple(3),
    "DICT": _Machine._dict,
    "APPEND": lambda self, _: self._append([self._stack.pop()]),
    "APPENDS": lambda self, _: self._append(self._popped()),
    "SETITEM": lambda self, _: self._set([self._stack.pop(-2), self._stack.pop()]),
    "SETITEMS": lambda self, _: self._set(self._popped()),
    "GLOBAL": lambda self, argument: self._global(*argument.split(" ", 1)),
    "STACK_GLOBAL": _Machine._stack_global,
    "INST": _Machine._refused_name,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._reference,
    "PUT": _Machine._put,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "GET": _Machine._get,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
}
