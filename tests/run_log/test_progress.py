"""Laws of the printed progress: a line holds the available metrics, the clock counts training alone, the table is short."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deq_flax.devices.mesh import MeshOptions, make_mesh
from deq_flax.run_log import progress
from deq_flax.run_log.progress import Clock, device_summary, parameter_table, progress_line
from deq_flax.run_log.run_log import RunLog

METRICS = {
    "loss": 4.2131,
    "ppl": 67.52,
    "forward_nfe": 17.2,
    "forward_residual": 6.1e-4,
    "backward_nfe": 15.0,
    "backward_residual": 8e-4,
    "grad_norm": 0.921,
    "learning_rate": 9.8e-4,
    "tokens_per_second": 21300.0,
    "steps_per_second": 480 / 65,
}


def test_progress_line():
    assert progress_line(120, 600, METRICS) == (
        "step 120/600  loss 4.213  ppl 67.52  fwd 17.2 evals 6.1e-04  bwd 15.0 evals 8.0e-04  "
        "grad 0.92  lr 9.8e-04  21.3k tok/s  ETA 1m05s"
    )
    extra = {"loss": 4.2131, "jacobian_loss": 1.2345, "consistency_loss": 0.01234}
    assert progress_line(1, 6, extra) == "step 1/6  loss 4.213  jac 1.23  cons 0.012"


@pytest.mark.parametrize("missing", [*METRICS, "everything"])
def test_progress_line_without_some_metric(missing, tmp_path, capsys):
    present = {} if missing == "everything" else {name: x for name, x in METRICS.items() if name != missing}
    with RunLog(tmp_path, None) as log:
        log.print_progress(5, 600, present | ({"loss": math.nan} if "loss" in present else {}), "valid")
    out = capsys.readouterr().out
    assert out.startswith("valid step   5/600") and out.count("\n") == 1
    assert ("loss nan" in out) == ("loss" in present)
    assert ("bwd" in out) == (missing not in ("backward_nfe", "backward_residual", "everything"))


def test_clock_leaves_pauses_out():
    clock = Clock()
    start = time.perf_counter()
    with clock.pause():
        time.sleep(0.05)
    seconds, all_seconds = clock.lap(), time.perf_counter() - start
    assert 0 < seconds <= all_seconds - 0.05
    assert clock.lap() < 0.05


PARAMS = {
    "embedding": {"tables": {0: jnp.zeros((1000, 8)), 1: jnp.zeros((50, 8))}},
    "cell": {f"layer{i}": {"kernel": jnp.zeros((4, i + 1)), "bias": jnp.zeros(i + 1)} for i in range(30)},
}
COUNT = 1050 * 8 + sum(5 * (i + 1) for i in range(30))


def test_a_few_parameters_are_listed_by_array(monkeypatch):
    monkeypatch.setattr(progress, "MAX_ROWS", 62)
    table = parameter_table(PARAMS)
    assert "embedding/tables/0" in table and "cell/layer29/bias" in table and "(4, 30)" in table
    assert table.splitlines()[-1] == f"Total: {COUNT:,} -- {4 * COUNT:,} bytes"


def test_many_parameters_are_summed_by_top_level_module():
    rows = [line.split() for line in parameter_table(PARAMS).splitlines()]
    assert ["|", "embedding", "|", "2", "|", "8,400", "|"] in rows and ["|", "cell", "|", "60", "|", "2,325", "|"] in rows
    assert len(rows) == 7 and rows[-1][:2] == ["Total:", f"{COUNT:,}"]


def test_shapes_are_enough_for_the_table():
    assert parameter_table(jax.eval_shape(lambda: PARAMS)) == parameter_table(PARAMS)


def test_devices_and_bytes_are_those_of_the_shardings():
    mesh = make_mesh(MeshOptions(data=2, fsdp=4, tensor=1))
    split, everywhere = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    state = {
        "w": jax.device_put(np.zeros((400, 10), np.float32), split),
        "n": jax.device_put(np.zeros(5, np.int32), everywhere),
    }
    first, second = device_summary(mesh, state).splitlines()
    assert first == "devices: 8 x cpu; mesh: data 2, fsdp 4, tensor 1"
    assert second == "training state: 16kB, 4.02kB on each device"
