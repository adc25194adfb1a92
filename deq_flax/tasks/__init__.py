"""Tasks by name. A new one is a class with the methods of `task.Task`, the four attributes below, and a line in this table.

| attribute | meaning |
|---|---|
| `Data` | the dataclass of its section `data` |
| `Loss` | the dataclass of its section `loss`, or None: no such section |
| `kind` | the `kind` of the models it can train |
| `__init__(data, model, *, loss, seed)` | sections as these dataclasses; `loss` only where there is such a section |
"""

from typing import Any

from deq_flax.tasks.classification import ClassificationTask
from deq_flax.tasks.language import LanguageTask
from deq_flax.tasks.reasoning import ReasoningTask
from deq_flax.tasks.segmentation import SegmentationTask

TASKS: dict[str, Any] = {
    "language": LanguageTask,
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
    "reasoning": ReasoningTask,
}
