"""Common parts of all commands: flags, configs, help, and one clear line for every user error.

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")

def main():
    train(cli.resolved(), workdir=_WORKDIR.value)

if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
"""

import contextlib
import errno
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags

from deq_flax import options
from deq_flax.config import Config, Override, resolve, section_types, takes_no_text, to_dict
from deq_flax.config_files import load_config
from deq_flax.errors import UserError
from deq_flax.run_log.results import to_json

flags.disclaim_key_flags()

_HELP = {"-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull", "-?"}

OfRun = tuple[str, Callable[[str], Config | None]]
"""A flag that names a run, and the function from its value to the config that is taken where `--config` is not given; None: the
run has no config yet."""


def config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Define `--config`, which the overrides `--config.section.key=value` may follow; see `resolved`."""
    text = "a recipe by name, such as wt103:tiny; or FILE.py[:VARIANT]; or the config.json of a run"
    holder = flags.DEFINE_string("config", None, text, flag_values=flag_values)
    _flag(flag_values).overrides = []
    return holder


def resolved(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """The config of the command line, or of the run that it names, with its overrides. `run` has checked it.

    Raises:
      UserError: `--config` was not given, and there is no run to take it from.
    """
    config = _flag(flag_values).resolved
    require(config is not None, "--config is missing, and there is no run to take it from; see --help")
    return config


def given_keys(flag_values: flags.FlagValues = flags.FLAGS) -> set[str]:
    """The keys that the command line overrides, such as 'model.downsample'."""
    return {key for key, _ in _flag(flag_values).overrides}


def run(
    main: Callable[..., Mapping[str, Any] | None],
    argv: Sequence[str] | None = None,
    *,
    required: Sequence[str] = (),
    positional: Sequence[str] = (),
    of_run: OfRun | None = None,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> NoReturn:
    """Parse the command line, call `main(*positional arguments)` and exit.

    Exit codes: 0; 2 after a user error or for want of memory (one line `error: ...` on stderr, no traceback); 130 when
    interrupted. Any other exception is a bug and keeps its traceback. With `--json`, what `main` returns is printed as one JSON
    object on stdout, or `{"error": ...}`, and all else goes to stderr; with `--json=FILE` it is written there, and all else
    stays where it is.

    Args:
      main: the function to call; the docstring of its module begins the help text.
      argv: the command line, program name first; by default `sys.argv`.
      required: flags that must be set.
      positional: names of the arguments besides flags, all of them required.
      of_run: where the config comes from if `--config` is not given.
      flag_values: where the flags were defined.
    """
    _replace_closed_streams()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    _silence_failed_writes()
    argv = list(sys.argv if argv is None else argv)
    json_to, argv = _without_json(argv)
    if json_to and not Path(json_to).resolve().parent.is_dir():
        _fail(f"--json={json_to}: there is no such folder", None)
    try:
        with contextlib.redirect_stdout(sys.stderr) if json_to == "" else contextlib.nullcontext():
            arguments = _parse(main, argv, required, positional, of_run, flag_values)
            result = None if arguments is None else main(*arguments)
        if json_to is not None and result is not None:
            _write_json(result, json_to)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error), json_to)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        _fail(f"out of memory: take smaller batches, examples or models ({reason or 'no more could be allocated'})", json_to)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout has closed it
        _discard_output()
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        _discard_output()
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: the machine refused something that this needs: {error.strerror}{place}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _fail(message: str, json_to: str | None) -> NoReturn:
    """Print the one line of an error, and exit."""
    message = " ".join(message.split())
    if json_to is not None:
        _write_json({"error": message}, json_to)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


_OUTSIDE = {
    getattr(errno, name) for name in ["EMFILE", "ENFILE", "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ENOMEM", "EAGAIN"]
}
"""Errors that are neither the user's nor ours: limits of the machine, and full or failing disks."""


def _silence_failed_writes() -> None:
    """Print no tracebacks of failed writes in the background: they are raised where the run waits for the write."""
    for library in ("absl", "asyncio"):  # Orbax's
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # of a write that Orbax gave up
    sys.unraisablehook = _report_unraisable


def _report_unraisable(unraisable: Any) -> None:
    """Print an uncatchable exception, unless a thread of TensorStore raised it because Orbax has closed its event loop."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _replace_closed_streams() -> None:
    """Put a sink where the shell has closed a standard stream: the next file to be opened would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _discard_output() -> None:
    """Let what standard output still holds go nowhere when it is closed at the end."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def _parse(
    main: Callable,
    argv: list[str],
    required: Sequence[str],
    positional: Sequence[str],
    of_run: OfRun | None,
    flag_values: flags.FlagValues,
) -> list[str] | None:
    """The positional arguments; None if help was requested, which is printed."""
    end = argv.index("--") if "--" in argv else len(argv)
    wants_help = any(argument in _HELP for argument in argv[1:end])
    argv = [argument for i, argument in enumerate(argv) if i == 0 or i > end or argument not in _HELP]
    if "config" in flag_values:
        argv = _read_config(argv, of_run, flag_values)
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


def _read_config(argv: Sequence[str], of_run: OfRun | None, flag_values: flags.FlagValues) -> list[str]:
    """Read the config and the overrides, and check both. Returns the arguments without the overrides."""
    flag, mapping = _flag(flag_values), None
    flag.resolved = None
    name = _text_of(argv, "config")
    listed = f"--config {name}"
    if name is not None:
        mapping = load_config(name)
    elif of_run is not None and (run := _text_of(argv, of_run[0])):
        config = of_run[1](run)
        mapping = None if config is None else to_dict(config)
        listed = f"--{of_run[0]} {run}"
    flag.overrides, rest = _overrides(argv, mapping)
    if mapping is not None:
        try:
            flag.resolved = resolve(mapping, flag.overrides)
        except options.UnknownKeyError as error:
            message = str(error) if str(error).endswith("?") else f"{error}."
            raise UserError(f"{message} To list the keys: {listed} --help") from error
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


def _without_json(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file of `--json=FILE`, '' for stdout, or None if it is not among the arguments; and the others."""
    end = argv.index("--") if "--" in argv else len(argv)
    found, rest = None, []
    for i, argument in enumerate(argv):
        flag, _, file = argument.partition("=")
        if i < end and flag in ("--json", "-json"):
            found = file
        else:
            rest.append(argument)
    return found, rest


def _write_json(result: Mapping[str, Any], file: str) -> None:
    """Print a result on stdout, or write it to a file; a file that cannot be written only costs the file."""
    if not file:
        print(to_json(result), flush=True)
        return
    try:
        Path(file).write_text(to_json(result) + "\n")
    except OSError as error:
        print(f"warning: {file} was not written: {error.strerror}", file=sys.stderr)


def _text_of(argv: Sequence[str], name: str) -> str | None:
    """The text given for a flag, before anything is parsed; of several the last."""
    value, arguments = None, iter(argv)
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            value = text if equals else next(arguments, None)
    return value


def _help(main: Callable, positional: Sequence[str], flag_values: flags.FlagValues) -> str:
    """The command's docstring, its own flags and, if a config was named, that config's keys, values and documentation."""
    module = inspect.getmodule(main)
    lines = [(getattr(module, "__doc__", None) or "").strip(), "", "Flags:"]
    home = sys.argv[0] if main.__module__ == "__main__" else main.__module__
    for flag in flag_values.get_key_flags_for_module(home):
        default = "" if flag.default is None else f" (default: {flag.default})"
        lines.append(f"  --{flag.name:<12} {flag.help}{default}")
    lines.append(
        f"  --{'json':<12} print the result as one JSON object on stdout, and all else on stderr; --json=FILE: write it there"
    )
    lines.append(f"  --{'help':<12} this text; with a config, also its keys and their values")
    if positional:
        lines.insert(2, f"Arguments: {' '.join(positional)}\n")
    if "config" in flag_values and _flag(flag_values).resolved is not None:
        lines += ["", "Keys of the config, with their values here:", *_documented(resolved(flag_values))]
    elif "config" in flag_values:
        lines += ["", "Every key of the config can be set: --config.section.key=value. To list them: --config NAME --help"]
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
