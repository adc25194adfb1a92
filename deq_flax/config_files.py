"""The config that a command line names: a recipe of this package, a config file, or what a run has stored."""

import inspect
import runpy
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deq_flax import options
from deq_flax.checkpoints.loading import load_meta
from deq_flax.config import Config, from_stored, read_config, read_run_config, to_dict
from deq_flax.errors import UserError

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "configs"
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"
"""Folder of the recipes: in the package where it is installed, beside it in a checkout."""


def load_config(name: str) -> dict[str, Any]:
    """The nested mapping of a config, for `config.resolve`.

    Args:
      name: a recipe of this package, such as 'wt103' or 'wt103:tiny'; a file, FILE.py or FILE.py:VARIANT; or the config.json of
        a run.

    Raises:
      UserError: there is no such recipe, file or variant, or the file raises an error.
    """
    if Path(name).suffix == ".json":
        return to_dict(read_config(Path(name)))
    path, variant = _file_and_variant(name)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError("it defines no get_config()")
        if variant and not inspect.signature(get_config).parameters:
            raise UserError(f"it has no variants: leave out :{variant}")
        config = get_config(variant) if variant else get_config()
    except Exception as error:  # whatever a config file raises while it is executed
        raise UserError(f"config {name}: {_reason(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {name}: get_config() must return a ConfigDict")
    return config.to_dict()


def run_config(workdir: str) -> Config | None:
    """The config that a run has stored in its workdir; None if there is none."""
    return read_run_config(Path(workdir)) if (Path(workdir) / "config.json").exists() else None


def checkpoint_config(path: str) -> Config:
    """The config that a checkpoint holds; argument and errors as for `checkpoints.loading.load_meta`."""
    return stored_config(load_meta(path))


def stored_config(meta: Mapping[str, Any]) -> Config:
    """The config in a checkpoint's `meta`. UserError: there is none."""
    try:
        config = from_stored(meta["config"])
        if getattr(config.model, "vocab_size", None) == 0:  # written before 0.1.0, which left it to the text
            config = replace(config, model=replace(config.model, vocab_size=_words(meta["arrays"]["params"])))
        return config
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"this checkpoint does not hold the config of a model: {error}") from error


def _words(params: Mapping[str, Any]) -> int:
    """The number of words in a checkpoint's arrays."""
    return sum(array["shape"][0] for name, array in params.items() if name.startswith("embedding/tables_NE/"))


def _file_and_variant(name: str) -> tuple[Path, str]:
    """The file that a name means, and the variant in it. UserError: there is no such file."""
    file, _, variant = name.partition(":")
    path, recipes = Path(file), sorted(path.stem for path in RECIPES.glob("*.py"))
    if not path.suffix and file == path.name and not path.is_file():
        if file not in recipes:
            raise UserError(f"unknown config {file!r}{options.suggestion(file, recipes)} (a file is named FILE.py)")
        return RECIPES / f"{file}.py", variant
    if not path.is_file():
        known = f"; the recipe of this name: --config {path.stem}" if path.stem in recipes else ""
        raise UserError(f"config {name}: there is no such file, or it cannot be opened{known}")
    return path, variant


def _reason(error: Exception, path: Path) -> str:
    """The reason why a config file failed; the author of a config words its UserError, ValueError and TypeError."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, UserError | ValueError | TypeError) and not isinstance(error, UnicodeError):
        return text
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{type(error).__name__}: {text}" + (f" (line {lines[-1]})" if lines else "")
