"""All commands of this package under one name: `deq-flax COMMAND ...`, or `python -m deq_flax COMMAND ...`.

  deq-flax train --config wt103:tiny --workdir runs/tiny
  deq-flax eval --workdir runs/tiny --json
  deq-flax plot --workdir runs/tiny

`deq-flax COMMAND --help` explains a command.
"""

import runpy
import sys
from typing import NamedTuple

import deq_flax
from deq_flax.options import suggestion


class Command(NamedTuple):
    """A command."""

    purpose: str
    module: str
    """The module that is run as a program."""
    extra: str = "train"
    """The extra whose packages it needs."""
    arguments: tuple[str, ...] = ()
    """Arguments that stand before those of the command line."""


COMMANDS = {
    "train": Command("train a model, or continue a run", "main"),
    "eval": Command("evaluate a run's best checkpoint", "main", arguments=("--mode", "eval")),
    "generate": Command("generate text with a language model", "generate"),
    "plot": Command("draw a run's curves, and pictures of its model", "plot", extra="plot"),
    "solve": Command("show a puzzle being solved", "solve"),
    "tokenize": Command("encode text files as subword tokens", "tokenize", extra="text"),
    "compile": Command("compile the steps of a config for TPUs, and account for their cost", "compile", extra="train"),
    "convert": Command("convert weights of the original PyTorch code, or back", "convert", extra="convert"),
}


def main() -> None:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "-help", "--help", "help"):
        print(f"{(__doc__ or '').strip()}\n\nCommands:")
        for known, command in COMMANDS.items():
            print(f"  {known:<10}{command.purpose}")
        return
    if name == "--version":
        print(deq_flax.__version__)
        return
    if name not in COMMANDS:
        _fail(f"unknown command {name!r}{suggestion(name, COMMANDS)}")
    command = COMMANDS[name]
    sys.argv = [f"deq-flax {name}", *command.arguments, *arguments]
    try:
        runpy.run_module(f"deq_flax.{command.module}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("deq_flax"):
            raise
        _fail(f"{name} needs the package {error.name}, which is not installed: pip install 'deq-flax[{command.extra}]'")


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
