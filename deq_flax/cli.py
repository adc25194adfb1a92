"""Common parts of all commands: flags, configs, help, and one clear line for every user error.

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")

def main():
    train(cli.resolved(), workdir=_WORKDIR.value)

if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
"""

import contextlib
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from deq_flax import options
from deq_flax.config import Config, Override, resolve, section_types, takes_no_text, to_dict
from deq_flax.errors import UserError

flags.disclaim_key_flags()

_HELP = {"-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull", "-?"}


def config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Define `--config FILE.py[:variant]`, which the overrides `--config.section.key=value` may follow; see `resolved`."""
    holder = config_flags.DEFINE_config_file(
        "config", None, "configuration, as FILE.py or FILE.py:variant", flag_values=flag_values, lock_config=False, sys_argv=[]
    )
    _flag(flag_values).overrides = []
    return holder


def resolved(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """The config of the command line, with its overrides. `run` has checked it."""
    return _flag(flag_values).resolved


def given_keys(flag_values: flags.FlagValues = flags.FLAGS) -> set[str]:
    """The keys that the command line overrides, such as 'model.downsample'."""
    return {key for key, _ in _flag(flag_values).overrides}


def run(
    main: Callable[..., Any],
    argv: Sequence[str] | None = None,
    *,
    required: Sequence[str] = (),
    positional: Sequence[str] = (),
    flag_values: flags.FlagValues = flags.FLAGS,
) -> NoReturn:
    """Parse the command line, call `main(*positional arguments)` and exit.

    Exit codes: 0; 2 after a user error (one line `error: ...` on stderr, no traceback); 130 when interrupted;
    the result of `main` if that is an integer. Any other exception is a bug and keeps its traceback.

    Args:
      main: the function to call; the docstring of its module begins the help text.
      argv: the command line, program name first; by default `sys.argv`.
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
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def _parse(
    main: Callable, argv: list[str], required: Sequence[str], positional: Sequence[str], flag_values: flags.FlagValues
) -> list[str] | None:
    """The positional arguments; None if help was requested, which is printed."""
    end = argv.index("--") if "--" in argv else len(argv)
    wants_help = any(argument in _HELP for argument in argv[1:end])
    argv = [argument for i, argument in enumerate(argv) if i == 0 or i > end or argument not in _HELP]
    if "config" in flag_values:
        argv = _read_config(argv, flag_values)
    try:
        rest = flag_values(argv)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from error
    if wants_help:
        print(_help(main, positional, flag_values), flush=True)
        return None
    for name in required:
        require(flag_values[name].value is not None, f"--{name} is missing; see --help")
    if len(rest) != len(positional):
        wants = " ".join(positional) or "none"
        raise UserError(f"got {len(rest)} arguments besides flags ({' '.join(rest) or 'none'}), need {wants}; see --help")
    return rest


def _read_config(argv: Sequence[str], flag_values: flags.FlagValues) -> list[str]:
    """Read the config file and the overrides, and check both. Returns the other arguments."""
    flag, mapping = _flag(flag_values), None
    path, without_config = _taken_out(argv, "config")
    if path is not None:
        sys.modules.pop("config_config", None)  # or a config file is executed on top of the one read before
        try:
            with warnings.catch_warnings():  # ml_collections imports config files in a way that Python deprecates
                warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
                flag.parse(path)
            if not isinstance(flag.value, ConfigDict):
                with contextlib.suppress(KeyError, TypeError, IndexError):
                    flag.value["config"]  # a file that could not be opened raises its OSError here
                raise UserError(f"config {path}: get_config() must return a ConfigDict")
        except UserError:
            raise
        except Exception as error:  # whatever a config file raises while it is executed
            raise UserError(_explain(error, path)) from error
        mapping = flag.value.to_dict()
    # A config that was read is taken out: absl would read it again.
    flag.overrides, rest = _overrides(argv if mapping is None else without_config, mapping)
    if mapping is not None:
        try:
            flag.resolved = resolve(mapping, flag.overrides)
        except UserError as error:
            unknown = "has no key" in str(error) or "has no section" in str(error)
            raise UserError(f"{error}{f' To list the keys: --config {path} --help' if unknown else ''}") from error
    return rest


def _overrides(argv: Sequence[str], mapping: dict[str, Any] | None) -> tuple[list[Override], list[str]]:
    """The overrides `--config.KEY=TEXT`, `--config.KEY TEXT`, `--config.KEY` and `--noconfig.KEY`; and the other arguments."""
    found: list[Override] = []
    rest, arguments = [], iter(argv)
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        dashes, name = flag[: len(flag) - len(flag.lstrip("-"))], flag.lstrip("-")
        if dashes not in ("-", "--") or not name.startswith(("config.", "noconfig.")):
            rest.append(argument)
            continue
        key = name.partition(".")[2]
        if name.startswith("noconfig."):
            found.append((key, "false"))
        elif equals:
            found.append((key, text))
        elif mapping is not None and takes_no_text(mapping, key):
            found.append((key, None))
        else:
            following = next(arguments, None)
            require(following is not None, f"--config.{key} needs a value: --config.{key}=VALUE")
            found.append((key, following))
    return found, rest


def _explain(error: BaseException, config: str) -> str:
    """Describe in one line an error that ml_collections or a config file raised."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    file = config.split(":")[0]
    _, has_trace, trace = text.partition("Error whilst parsing config file:")
    if has_trace:  # ml_collections put a traceback into the message: its last line has the cause
        return f"config {config}: " + trace.strip().splitlines()[-1].removeprefix("ValueError: ").removeprefix("TypeError: ")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if lines or isinstance(error, SyntaxError):
        return f"config {config}: {type(error).__name__}: {text}" + (f" (line {lines[-1]})" if lines else "")
    if "no attribute 'get_config'" in text:
        return f"config {config}: it defines no get_config()"
    if isinstance(error, OSError):
        return f"config {config}: there is no such file, or it cannot be opened"
    return f"config {config}: {type(error).__name__}: {text}"


def _taken_out(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The text given for a flag, before anything is parsed, of several the last; and the arguments without that flag."""
    value, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            value = text if equals else next(arguments, None)
        else:
            rest.append(argument)
    return value, rest


def _help(main: Callable, positional: Sequence[str], flag_values: flags.FlagValues) -> str:
    """The command's docstring, its own flags and, if a config was named, that config's keys, values and documentation."""
    module = inspect.getmodule(main)
    lines = [(getattr(module, "__doc__", None) or "").strip(), "", "Flags:"]
    home = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    for flag in flag_values.get_key_flags_for_module(home):
        default = "" if flag.default is None else f" (default: {flag.default})"
        lines.append(f"  --{flag.name:<12} {flag.help}{default}")
    lines.append(f"  --{'help':<12} this text; with --config, also the keys and values of that config")
    if positional:
        lines.insert(2, f"Arguments: {' '.join(positional)}\n")
    if "config" in flag_values and flag_values["config"].value is not None:
        lines += ["", f"Keys of {_flag(flag_values).config_filename}, with their values here:"]
        lines += _documented(resolved(flag_values))
    elif "config" in flag_values:
        lines += ["", "Every key of the config can be set: --config.section.key=value. To list them: --config FILE.py --help"]
    return "\n".join(lines)


def _documented(config: Config) -> list[str]:
    """A line for every key, with its documentation below."""
    values, lines = to_dict(config), [f"  --config.task={config.task}"]
    for section, cls in section_types(values).items():
        docs = options.docs_of(cls)
        for key, value in values[section].items():
            lines += [f"  --config.{section}.{key}={options.shown(value)}", f"      {docs.get(key, '')}"]
    return lines


def _flag(flag_values: flags.FlagValues) -> Any:
    return flag_values["config"]


def _fail(error: BaseException) -> NoReturn:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
