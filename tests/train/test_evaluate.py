"""Laws of evaluation for every task: when metrics are read from the device, and how batches are summed."""

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from deq_flax.devices.mesh import MeshOptions, make_mesh
from deq_flax.task import average
from deq_flax.train.evaluate import measure


class Task:
    """A task of four batches, each of which holds its own number."""

    eval_batch_size = 1

    def eval_batches(self, split, rows=None):
        return [{"number": np.full((1,), number)} for number in range(4)]

    def fresh_carry(self, model, batch_size):
        return ()


class RecordedArray:
    """An array that records when it is read."""

    def __init__(self, number, events):
        self.number, self.events = number, events

    def __array__(self, dtype=None, copy=None):
        self.events.append(f"read {self.number}")
        return np.ones((), dtype)


def measured(step):
    return measure(Task(), None, step, make_mesh(MeshOptions(data=1)), {}, {}, "valid")


def test_metrics_are_read_one_batch_behind():
    """With nothing read, programs pile up in the device's queue; with all read at once, the device waits for the host."""
    events = []

    def step(params, variables, batch, carry, scalars):
        number = int(batch["number"][0])
        events.append(f"step {number}")
        return carry, {"loss": clu_metrics.Average(total=RecordedArray(number, events), count=np.ones(()))}

    assert measured(step) == {"loss": 1.0}
    assert events == ["step 0", "step 1", "read 0", "step 2", "read 1", "step 3", "read 2", "read 3"]


def test_sums_are_exact_beyond_what_float32_counts():
    def step(params, variables, batch, carry, scalars):
        first = batch["number"][0] == 0
        return carry, {"accuracy": average(jnp.where(first, 2.0**24, 1.0), jnp.where(first, 2.0**25, 1.0))}

    assert measured(jax.jit(step)) == {"accuracy": (2**24 + 3) / (2**25 + 3)}
