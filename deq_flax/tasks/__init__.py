"""Tasks by name. A new one is a class with the methods of `task.Task`, and a line in this table."""

from collections.abc import Mapping
from typing import Any

from deq_flax.errors import UserError
from deq_flax.task import Task
from deq_flax.tasks.classification import ClassificationTask
from deq_flax.tasks.language import ExplicitLanguageTask, LanguageTask
from deq_flax.tasks.segmentation import SegmentationTask

TASKS: dict[str, type] = {
    "language": LanguageTask,
    "explicit_language": ExplicitLanguageTask,
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
}


def make_task(config: Mapping[str, Any]) -> Task:
    """The task that a config, as plain nested dictionaries, describes. UserError: there is no such task, or it cannot be."""
    name = config["task"]
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    sections = {section: config[section] for section in ("data", "model", "deq", "loss") if section in config}
    return TASKS[name](**sections, seed=config["train"]["seed"])
