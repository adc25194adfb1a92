"""Text for the terminal: the table of parameters, the devices, and a line of progress with its clock."""

import contextlib
import math
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from deq_flax.devices.sharding import bytes_on_device

MAX_ROWS = 40
"""Arrays that the table of parameters lists at most."""

_FIELDS = (
    ("loss {}", ("loss", "{:.3f}")),
    ("ppl {}", ("ppl", "{:.4g}")),
    ("accuracy {}", ("accuracy", "{:.2%}")),
    ("exact {}", ("exact_match", "{:.2%}")),
    ("miou {}", ("miou", "{:.2%}")),
    ("fwd {} evals {}", ("forward_nfe", "{:.1f}"), ("forward_residual", "{:.1e}")),
    ("bwd {} evals {}", ("backward_nfe", "{:.1f}"), ("backward_residual", "{:.1e}")),
    ("jac {}", ("jacobian_loss", "{:.3g}")),
    ("cons {}", ("consistency_loss", "{:.2g}")),
    ("grad {}", ("grad_norm", "{:.2g}")),
    ("lr {}", ("learning_rate", "{:.1e}")),
)
"""Each part of a progress line, with its metrics and their formats; a part of which a metric is missing is left out."""


def progress_line(step: int, steps: int, metrics: Mapping[str, Any], split: str = "train") -> str:
    """One line to read: `step 120/600  loss 4.213  ppl 67.5  fwd 17.2 evals 6.1e-04 ...  21.3k tok/s  ETA 1m05s`.

    Args:
      step, steps: updates done, and in total.
      metrics: as in `metrics.jsonl`; any may be missing.
      split: name of the split; it begins the line unless it is 'train'.
    """
    parts = [f"{'' if split == 'train' else split + ' '}step {step:>{len(str(steps))}}/{steps}"]
    for text, *needs in _FIELDS:
        if all(metrics.get(name) is not None for name, _ in needs):
            parts.append(text.format(*(form.format(to_number(metrics[name])) for name, form in needs)))
    for name, unit in (("tokens_per_second", "tok/s"), ("examples_per_second", "ex/s")):
        if metrics.get(name) is not None:
            parts.append(f"{_short(to_number(metrics[name]))} {unit}")
    rate = metrics.get("steps_per_second")
    if rate is not None and to_number(rate) > 0:
        parts.append(f"ETA {_duration((steps - step) / to_number(rate))}")
    return "  ".join(parts)


class Clock:
    """Seconds spent training. Time within `pause` (evaluation, checkpoints, compilation) does not count."""

    def __init__(self):
        self._paused = 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Generator[None]:
        """Stop the clock for the length of a `with` block. Wait for the device first, or its queued work is not counted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def lap(self) -> float:
        """Seconds since the last lap, or since the beginning, without pauses; never 0."""
        now = time.perf_counter()
        seconds = now - self._since - self._paused
        self._since, self._paused = now, 0.0
        return max(seconds, 1e-9)


@dataclass
class _Row:
    """The parameters of a top-level module; field names are the columns."""

    module: str
    arrays: int
    size: int


def parameter_table(params: Mapping[str, Any]) -> str:
    """A table of the parameters and their total: a row for each array or, beyond `MAX_ROWS`, for each top-level module.

    Args:
      params: nested dictionaries of arrays, or of shapes and dtypes.
    """
    overview = parameter_overview.get_parameter_overview(dict(params), include_stats=False)
    arrays = parameter_overview.flatten_dict(dict(params))
    if len(arrays) <= MAX_ROWS:
        return overview
    rows: dict[str, _Row] = {}
    for name, array in sorted(arrays.items()):
        row = rows.setdefault(name.split("/")[0], _Row(name.split("/")[0], 0, 0))
        row.arrays, row.size = row.arrays + 1, row.size + math.prod(array.shape)
    table = parameter_overview.make_table(list(rows.values()))
    return f"{table}\n{overview.splitlines()[-1]}"


def device_summary(mesh: Mesh, state: Any) -> str:
    """Two lines on the devices of a run: their kind and mesh; and the bytes of its state, a pytree of arrays, on them.

    What a step needs besides, activations and the solver's history, is not known before it runs.
    """
    devices = mesh.devices.flatten()
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    return (
        f"devices: {len(devices)} x {devices[0].device_kind}{processes}; mesh: {axes}\n"
        f"training state: {_short(whole)}B, {_short(bytes_on_device(state))}B on each device"
    )


def to_number(value: Any) -> int | float:
    """A number from a number or from an array of one element."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


def rounded(value: int | float) -> int | float | None:
    """A number with seven significant digits, as JSON can hold it: None for NaN and infinities."""
    if isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _short(x: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
