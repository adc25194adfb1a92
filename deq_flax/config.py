"""A config: a task, and one checked dataclass for each section.

Config files and the command line give a nested mapping that holds only what differs from the defaults; `resolve` checks it and
fills in the rest. Every default, type and line of documentation stands in the section's dataclass:

| section | dataclass |
|---|---|
| data | `Data` of the task: `TextOptions`, `ImageOptions`, `SceneOptions`, `PuzzleOptions` |
| model | `Options` of the model that `model.name` names |
| deq | `train.phases.DEQOptions`; only for models with an equilibrium |
| loss | `Loss` of the task, if it has such a section |
| optimizer, train, eval | `train.optimizer.OptimizerOptions`, `train.loop.TrainOptions`, `train.evaluate.EvalOptions` |
| mesh, checkpoint | `devices.mesh.MeshOptions`, `checkpoints.CheckpointOptions` |
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deq_flax import options
from deq_flax.checkpoints.checkpoints import CheckpointOptions
from deq_flax.devices.mesh import MeshOptions
from deq_flax.errors import UserError
from deq_flax.models import MODELS
from deq_flax.task import Task
from deq_flax.tasks import TASKS
from deq_flax.train.evaluate import EvalOptions
from deq_flax.train.loop import TrainOptions
from deq_flax.train.optimizer import OptimizerOptions
from deq_flax.train.phases import DEQOptions, Phases, make_phases
from deq_flax.untrusted.files import read_json

MAX_REASON = 600
"""Most characters of a message about a file, which may quote it."""

Override = tuple[str, str | None]
"""A key, such as 'train.steps', and the text that the command line gives it; None: no text, as for
`--config.model.pre_norm`."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A resolved config. A section that does not apply is None."""

    task: str
    data: Any
    model: Any
    deq: DEQOptions | None
    loss: Any
    optimizer: OptimizerOptions
    train: TrainOptions
    eval: EvalOptions
    mesh: MeshOptions
    checkpoint: CheckpointOptions


_OF_EVERY_RUN: dict[str, type] = {
    "optimizer": OptimizerOptions,
    "train": TrainOptions,
    "eval": EvalOptions,
    "mesh": MeshOptions,
    "checkpoint": CheckpointOptions,
}
"""The sections whose dataclass depends on neither task nor model."""


def resolve(mapping: Mapping[str, Any], overrides: Sequence[Override] = ()) -> Config:
    """The config of a nested mapping, such as a config file returns, with overrides of the command line.

    Raises:
      UserError: a section or key is unknown (the nearest known one is named), missing, of another type, or out of range.
    """
    merged: dict[str, Any] = {name: dict(part) if isinstance(part, Mapping) else part for name, part in mapping.items()}
    for key, text in sorted(overrides, key=lambda override: override[0] not in ("task", "model.name")):
        _override(merged, key, text)
    sections = section_types(merged)
    for name in merged:
        if name not in (*sections, "task"):
            raise options.UnknownKeyError(f"the config has no section {name!r}{options.suggestion(name, sections)}")
    made: dict[str, Any] = {"deq": None, "loss": None}
    for name, cls in sections.items():
        part = merged.get(name, {})
        if not isinstance(part, Mapping):
            raise UserError(f"{name} is a section of the config, not {part!r}: set its keys, --config.{name}.KEY=VALUE")
        made[name] = options.make(cls, part, name)
    config = Config(task=merged["task"], **made)
    config.eval.check(None if config.deq is None else config.deq.evaluation_solver().max_steps)
    return config


def section_types(mapping: Mapping[str, Any]) -> dict[str, type]:
    """The dataclass of every section, by the task and the model's name. UserError: one of the two is missing or unknown."""
    if "task" not in mapping:
        raise UserError(f"task is missing from the config; known: {', '.join(TASKS)}")
    task = options.choose(TASKS, mapping["task"], "task")
    model = mapping.get("model", {})
    if not isinstance(model, Mapping) or "name" not in model:
        raise UserError(f"model.name is missing from the config; known: {', '.join(MODELS)}")
    cls = options.choose(MODELS, model["name"], "model.name")
    if cls.kind != task.kind:
        fitting = ", ".join(name for name, other in MODELS.items() if other.kind == task.kind)
        raise UserError(f"model.name {model['name']!r} is no model for task {mapping['task']!r}; known: {fitting}")
    if not cls.has_equilibrium and mapping.get("deq"):
        raise UserError(f"model {model['name']!r} has no equilibrium: leave out section deq")
    deq = DEQOptions if cls.has_equilibrium else None
    sections = {"data": task.Data, "model": cls.Options, "deq": deq, "loss": task.Loss} | _OF_EVERY_RUN
    return {name: section for name, section in sections.items() if section is not None}


def make_task(config: Config) -> Task:
    """The task of a config. UserError: its data cannot be read, or its values contradict each other."""
    loss = {} if config.loss is None else {"loss": config.loss}
    return TASKS[config.task](config.data, config.model, **loss, seed=config.train.seed)


def phases_of(config: Config) -> Phases:
    """The phases of a run of a config."""
    return make_phases(config.deq, seed=config.train.seed)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain data, which config.json and checkpoints hold and `resolve` takes back."""
    return {name: part for name, part in dataclasses.asdict(config).items() if part is not None}


def from_stored(mapping: Any) -> Config:
    """The config that a checkpoint or a config.json holds, also one written by an earlier version.

    One from before 0.1.0 may hold a `model.vocab_size` of 0: it left it to the text.

    Raises:
      UserError: it is not a config.
    """
    try:
        return resolve(_upgraded(mapping))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("it is not the config of a model, or was not written by this package") from error


def read_run_config(workdir: Path) -> Config:
    """The config of a run, from its config.json. UserError: none that can be read."""
    return read_config(workdir / "config.json")


def read_config(path: Path) -> Config:
    """The config in a JSON file. UserError: the file cannot be read, or is not a config."""
    try:
        return from_stored(read_json(path))
    except (OSError, ValueError, UserError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        raise UserError(f"cannot read {path}: {reason[:MAX_REASON]}{'...' * (len(reason) > MAX_REASON)}") from error


def flattened(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ('section.key', value) for each key of nested plain data."""
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value and not prefix:
            yield from flattened(value, f"{name}.")
        else:
            yield f"{prefix}{name}", value


def recipe(base: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]], variant: str) -> ConfigDict:
    """The config of a variant, for a config file: `base` with the variant's differences, {'section.key': value}, locked.

    None as the value of a section leaves the section out.

    Raises:
      ValueError: there is no such variant.
    """
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(variants)}")
    merged = copy.deepcopy(dict(base))
    for path, value in variants[variant].items():
        section, _, key = path.partition(".")
        if key:
            merged.setdefault(section, {})[key] = value
        elif value is None:
            del merged[section]
        else:
            merged[section] = copy.deepcopy(value)
    return ConfigDict(merged).lock()


def reference() -> str:
    """The reference of all sections and their keys in Markdown: docs/configuration.md."""
    parts = [_REFERENCE_HEAD]
    rooms = {
        "data": {f"task `{name}`": task.Data for name, task in TASKS.items()},
        "model": {f"`{name}`": model.Options for name, model in MODELS.items()},
        "deq": {"": DEQOptions},
        "loss": {f"task `{name}`": task.Loss for name, task in TASKS.items() if task.Loss},
    }
    rooms |= {name: {"": cls} for name, cls in _OF_EVERY_RUN.items()}
    for section, classes in rooms.items():
        named: dict[type, list[str]] = {}
        for who, cls in classes.items():
            named.setdefault(cls, []).append(who)
        for cls, who in named.items():
            parts.append(f"## {section}" + (f": {' and '.join(who)}" if who != [""] else ""))
            parts.append("| key | default | meaning |\n|---|---|---|\n" + "".join(_reference_rows(cls)))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


_REFERENCE_HEAD = """# Configuration

Generated by `python -m deq_flax.config > docs/configuration.md` from the dataclasses of the sections.

`--config` names a recipe of this package, `wt103:tiny`; a file, `FILE.py` or `FILE.py:VARIANT`; or what a run has stored,
`DIR/config.json`. A command that names a run takes its stored config by itself.

A config file defines `get_config(variant)`, which returns an `ml_collections.ConfigDict`: `task`, `model.name`, and the keys
whose values are its own. All other keys have the defaults below. Every key can be set on the command line,
`--config.section.key=VALUE`; tuples are written with commas, `--config.model.cutoffs=2000,5000`, an empty one as
`--config.model.cutoffs=`."""


def _reference_rows(cls: Any) -> Iterator[str]:
    docs = options.docs_of(cls)
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
        yield f"| `{field.name}` | {shown} | {docs.get(field.name, '').replace('|', chr(92) + '|')} |\n"


def _override(mapping: dict[str, Any], key: str, text: str | None) -> None:
    """Put the text of an override into a nested mapping, in the type of its option."""
    section, _, name = key.partition(".")
    if not name and key == "task":
        mapping["task"] = text
        return
    types = section_types(mapping) if key != "model.name" else {}
    if key == "model.name":
        mapping.setdefault("model", {})["name"] = text
        return
    if section not in types:
        raise options.UnknownKeyError(f"--config has no section {section!r}{options.suggestion(section, types)}")
    if not name:
        raise UserError(f"{section} is a section of the config: set its keys, --config.{section}.KEY=VALUE")
    option, _, inner = name.partition(".")
    hints = options.hints_of(types[section])
    options.require_known(option, hints, f"--config.{section}")
    value = options.parse("true" if text is None else text, Any if inner else hints[option], f"--config.{key}")
    part = mapping.setdefault(section, {})
    part[option] = {**part.get(option, {}), inner: value} if inner else value


def takes_no_text(mapping: Mapping[str, Any], key: str) -> bool:
    """Return True if `--config.KEY` alone sets a key, as for an option that is true or false."""
    section, _, name = key.partition(".")
    types = section_types(mapping)
    return section in types and options.hints_of(types[section]).get(name) is bool


_OLD_TASKS = {"explicit_language": ("language", "transformer_xl"), "language": ("language", "deq_transformer")}


def _upgraded(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config in today's keys. Before 0.1.0 the task chose the model, and `deq` held the options of some gradients."""
    config = {name: dict(part) if isinstance(part, Mapping) else part for name, part in mapping.items()}
    if "name" not in config["model"]:
        task, model = _OLD_TASKS.get(config["task"], (config["task"], "mdeq"))
        config |= {"task": task, "model": {"name": model} | config["model"]}
        deq = config.get("deq", {})
        memory, phantom = deq.pop("memory", 0), {"steps": deq.pop("phantom_steps", 5)}
        phantom["relaxation"] = deq.pop("phantom_damping", 0.5)
        if deq.get("gradient") == "phantom":
            deq["gradient_options"] = phantom
        for solver in ("solver", "backward_solver") if memory else ():
            if deq[solver] in ("anderson", "broyden"):
                deq[f"{solver}_options"] = {"memory": memory}
    return config


if __name__ == "__main__":
    print(reference(), end="")
