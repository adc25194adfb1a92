"""What the commands share: flags, help, and one clear line for every mistake of the user's.

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")

def main():
    train(**cli.config_to_kwargs(_CONFIG.value.train), workdir=_WORKDIR.value)

if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
"""

import contextlib
import inspect
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from deq_flax.errors import UserError

flags.disclaim_key_flags()

_HELP = {"-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull", "-?"}


def config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines `--config FILE.py[:variant]` and the overrides `--config.section.key=value`. Its value is a locked ConfigDict."""
    return config_flags.DEFINE_config_file(
        "config", None, "configuration, as FILE.py or FILE.py:variant", flag_values=flag_values
    )


def run(
    main: Callable[..., Any],
    argv: Sequence[str] | None = None,
    *,
    required: Sequence[str] = (),
    positional: Sequence[str] = (),
    flag_values: flags.FlagValues = flags.FLAGS,
) -> NoReturn:
    """Parses the command line, calls `main(*positional arguments)` and exits.

    Exit codes: 0; 2 after a mistake of the user's (one line `error: ...` on stderr, no traceback); 130 when interrupted;
    what `main` returns if that is an integer. Any other exception is a bug of ours and keeps its traceback.

    Args:
      main: its module's docstring is the head of the help text.
      argv: the command line, program name first; `sys.argv` unless given.
      required: flags that must be set.
      positional: names of the arguments besides flags, all of them required.
      flag_values: where the flags were defined.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax writes tracebacks of errors that reach us anyway
    argv = list(sys.argv if argv is None else argv)
    try:
        arguments = _parse(main, argv, required, positional, flag_values)
        code = None if arguments is None else main(*arguments)
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def config_to_kwargs(section: ConfigDict) -> dict[str, Any]:
    """A config, or a section of one, as plain nested dictionaries; tuples stay tuples."""
    return section.to_dict()


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def _parse(main, argv, required, positional, flag_values) -> list[str] | None:
    """The positional arguments; None if help was asked for, and given."""
    end = argv.index("--") if "--" in argv else len(argv)
    wants_help = any(argument in _HELP for argument in argv[1:end])
    argv = [argument for i, argument in enumerate(argv) if i == 0 or i > end or argument not in _HELP]
    sys_argv, sys.argv = sys.argv, argv  # where ml_collections looks for the overrides
    sys.modules.pop("config_config", None)  # or a config file is executed on top of the one read before
    try:
        with warnings.catch_warnings():  # ml_collections imports config files in a way that Python means to drop
            warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
            rest = flag_values(argv)[1:]
        if "config" in flag_values and flag_values["config"].value is not None:
            _check_config(flag_values)
    except UserError:
        raise
    except Exception as error:  # the flags' own errors, and whatever a config file raises while it is executed
        raise UserError(_explain(error, _value_of(argv, "config"))) from error
    finally:
        sys.argv = sys_argv
    if wants_help:
        print(_help(main, positional, flag_values))
        return None
    for name in required:
        require(flag_values[name].value is not None, f"--{name} is missing; see --help")
    if len(rest) != len(positional):
        wants = " ".join(positional) or "none"
        raise UserError(f"got {len(rest)} arguments besides flags ({' '.join(rest) or 'none'}), need {wants}; see --help")
    return rest


def _check_config(flag_values: flags.FlagValues) -> None:
    """The config was read, and tuples hold what they held before: ml_collections looks at neither."""
    flag: Any = flag_values["config"]
    if not isinstance(flag.value, ConfigDict):
        with contextlib.suppress(KeyError, TypeError, IndexError):
            flag.value["config"]  # a file that could not be opened raises its OSError here
        raise UserError(f"config {flag.config_filename}: get_config() must return a ConfigDict")
    for path, value in flag.override_values.items():
        if not isinstance(value, tuple):
            continue
        known = flag_values[f"config.{path}"].default or ()
        allowed = {type(element) for element in known} or {int, float}
        allowed |= {int} if float in allowed else set()
        names = " or ".join(sorted(kind.__name__ for kind in allowed))
        for element in value:
            require(type(element) in allowed, f"--config.{path}: {element!r} is not of type {names}; write --config.{path}=1,2")


def _explain(error: BaseException, config: str | None) -> str:
    """One line of what flags, ml_collections or a config file had to say."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    file = (config or "").split(":")[0]
    _, has_trace, trace = text.partition("Error whilst parsing config file:")
    if has_trace:  # ml_collections put a traceback into the message: its last line says it
        return f"config {config}: " + trace.strip().splitlines()[-1].removeprefix("ValueError: ").removeprefix("TypeError: ")
    if isinstance(error, flags.Error):
        return text
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if lines or isinstance(error, SyntaxError):
        return f"config {config}: {type(error).__name__}: {text}" + (f" (line {lines[-1]})" if lines else "")
    if "no attribute 'get_config'" in text:
        return f"config {config}: it defines no get_config()"
    if isinstance(error, OSError):
        return f"config {config}: there is no such file, or it cannot be opened"
    if isinstance(error, KeyError | AttributeError):
        hint = re.search(r'Did you mean "(.*)" instead of "(.*)"\?', text)
        what = f"{hint[2]!r}. Did you mean {hint[1]!r}?" if hint else text.strip("'\"") + "."
        return f"--config has no key {what} To list the keys: --config {config} --help"
    return f"config {config}: {type(error).__name__}: {text}"


def _value_of(argv: Sequence[str], name: str) -> str | None:
    """The text given for a flag, before anything is parsed."""
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            return value if equals else next(iter(argv[i + 1 :]), None)
    return None


def _help(main, positional, flag_values) -> str:
    """The command's docstring, its own flags and, if a config was named, that config's keys and values."""
    module = inspect.getmodule(main)
    lines = [(module.__doc__ or "").strip(), "", "Flags:"]
    home = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    for flag in flag_values.get_key_flags_for_module(home):
        if not flag.name.startswith("config."):
            default = "" if flag.default is None else f" (default: {flag.default})"
            lines.append(f"  --{flag.name:<12} {flag.help}{default}")
    lines.append(f"  --{'help':<12} this text; with --config, also the keys and values of that config")
    if positional:
        lines.insert(2, f"Arguments: {' '.join(positional)}\n")
    if "config" in flag_values and flag_values["config"].value is not None:
        flag = flag_values["config"]
        lines += ["", f"Keys of {flag.config_filename}, with their values here:"]
        lines += [f"  --config.{path}={_literal(value)}" for path, value in _leaves(flag.value)]
    elif "config" in flag_values:
        lines += ["", "Every key of the config can be set: --config.section.key=value. To list them: --config FILE.py --help"]
    return "\n".join(lines)


def _leaves(config: ConfigDict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _literal(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) and value else str(value)


def _fail(error: BaseException) -> NoReturn:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
