"""Steps compiled ahead of time from shapes alone: the same programs as those of a run."""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags as absl_flags

from deq_flax import cli, compile, main
from deq_flax.compilation import chips
from deq_flax.compilation.lower import CompiledStep, LoweredStep, _compile, compile_steps, lower_steps
from deq_flax.compilation.program import parts_of
from deq_flax.compilation.report import as_lines, cure, report
from deq_flax.compilation.stand_in import without_data
from deq_flax.config import make_task, resolve
from deq_flax.config_files import load_config
from deq_flax.data.images.labeled_datasets import LABELED
from deq_flax.data.images.scene_datasets import SCENES
from deq_flax.data.text.corpus import TEXTS
from deq_flax.devices.mesh import MeshOptions
from deq_flax.equilibrium import Broyden, fixed_point
from deq_flax.errors import UserError
from tests.commands import command, commands
from tests.compilation.test_program import HLO, fusion
from tests.test_configs import resolved
from tests.test_configs_vision import get

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
SMALL = {"d_model": 32, "d_embed": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "mem_len": 8}
FLAGS = [f"--config.model.{key}={value}" for key, value in SMALL.items()]
FLAGS += ["--config.data.seq_len=8", "--config.data.eval_seq_len=8", "--config.data.eval_batch_size=16"]
MEMORY = [f"{kind}_size_in_bytes" for kind in ("argument", "output", "alias", "temp", "generated_code")]


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Take the stand-ins out of the tables of data sets after each test."""
    for table in (TEXTS, LABELED, SCENES):
        monkeypatch.setitem(table, "zeros", None)


def small(mesh):
    config = resolved("wt103", "tiny")
    sizes = {"seq_len": 8, "eval_seq_len": 8, "batch_size": 16, "eval_batch_size": 16}
    model, data = dataclasses.replace(config.model, **SMALL), dataclasses.replace(config.data, **sizes)
    return dataclasses.replace(config, model=model, data=data, mesh=mesh)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (lambda: resolved("wt103", "base"), None),
        (lambda: get("cifar10", "tiny"), (32, 32, 3)),
        pytest.param(lambda: get("imagenet", "small"), (224, 224, 3), marks=pytest.mark.slow),
        pytest.param(lambda: get("cityscapes", "small"), (512, 1024, 3), marks=pytest.mark.slow),
    ],
    ids=["wt103", "cifar10", "imagenet", "cityscapes"],
)
def test_zeros_stand_in_for_the_data(config, shape):
    config = without_data(config())
    task = make_task(config)
    batch = next(task.train_batches(0))
    if shape is None:
        assert config.model.vocab_size == 267_735 and batch["inputs"].shape == (config.data.batch_size, config.data.seq_len)
    else:
        assert batch["images"].shape == (config.data.batch_size, *shape) and batch["images"].dtype == np.uint8
    assert not any(np.any(array) for name, array in batch.items() if name in ("inputs", "images", "labels"))


@pytest.mark.parametrize("name", ["sudoku:extreme_eqr", "maze:unique_trm", "state_tracking:s5"])
def test_random_symbols_stand_in_for_puzzles(name):
    config = resolve(load_config(name), [])
    data = dataclasses.replace(config.data, batch_size=8, eval_batch_size=4)
    task = make_task(without_data(dataclasses.replace(config, data=data)))
    shape = {"sudoku": (9, 9), "maze": (30, 30), "state_tracking": (4,)}[name.split(":")[0]]
    assert next(task.train_batches(0))["inputs"].shape == (8, *shape)
    assert task.eval_batches("valid")[0]["targets"].shape == (4, *shape)
    assert task.model_options.input_symbols == {"sudoku": 10, "maze": 6, "state_tracking": 120}[name.split(":")[0]]


def test_accelerator_types_name_topologies():
    types = {
        **{"v5litepod-1": "v5e:1x1", "v5litepod-8": "v5e:2x4", "v5litepod-16": "v5e:4x4", "v5litepod-256": "v5e:16x16"},
        **{"v6e-4": "v6e:2x2", "v6e-32": "v6e:4x8", "v5p-8": "v5p:2x2x1", "v5p-16": "v5p:2x2x2", "v5p-64": "v5p:2x4x4"},
        **{"v5p-1024": "v5p:8x8x8", "v4-32": "v4:2x2x4", "v5e:2x4": "v5e:2x4", "v5p-12": "v5p-12", "v9-4": "v9-4"},
    }
    assert {kind: chips.topology_of(kind) for kind in types} == types


@pytest.mark.slow
def test_the_compiled_step_is_that_of_a_run():
    config = small(MeshOptions(data=2, fsdp=4))
    (compiled,) = compile_steps(config, jax.devices(), names=["train"])
    from deq_flax.config import phases_of
    from deq_flax.devices.mesh import make_mesh
    from deq_flax.train.loop import Run

    run = Run(make_task(config), phases_of(config), config.train, make_mesh(config.mesh), config.optimizer)
    sizes = {
        name: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
        for name, tree in (("parameters", run.state.params), ("optimizer", run.state.opt_state), ("carry", run.state.carry))
    }
    assert compiled.step.kept == sizes
    account = report(compiled, None, config.deq)
    assert account["collectives"]["in_loops"] == {} and account["aliased"] >= sum(sizes.values())
    assert any("collectives in loops: none" in line for line in as_lines("train", account))


def lowered(jaxpr=None, **kept):
    """A step whose program is never read, of one device."""
    return LoweredStep("train", SimpleNamespace(as_text=str), None, 0.5, kept, jaxpr, 1)  # ty: ignore


def test_a_program_that_the_compiler_refuses_does_not_fit():
    class Lowered:
        def compile(self):
            used = "(64.50G) exceeds available HBM (15.75G)"
            raise jax.errors.JaxRuntimeError(
                f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total for HLO temporaries {used}"
            )

    compiled, refused = _compile(Lowered())  # ty: ignore
    step = lowered(parameters=2**30, optimizer=0, carry=0)
    account = report(CompiledStep(step, compiled, 1.0, refused), chips.CHIPS["v5e"], None)
    assert not account["fits"] and account["bytes"]["all"] == 65.5 * 2**30
    assert any(line.startswith("  does not fit: lower data.batch_size") for line in as_lines("train", account))


def test_the_flags_of_a_run_are_accepted():
    names = {flag.name for flag in absl_flags.FLAGS.get_flags_for_module(main.__name__)}
    assert names == {"config", "workdir", "mode", *compile.OF_A_RUN}


def test_advice_is_of_what_takes_the_memory():
    stored, computed = ({"bytes": {"parameters": n, "optimizer": n, "all": 10}} for n in (4, 1))
    assert cure("train", stored).startswith("set mesh.fsdp") and cure("train", computed).startswith("lower data.batch_size")
    assert cure("eval", stored).startswith("set mesh.tensor") and cure("eval", computed).startswith(
        "lower data.eval_batch_size"
    )


def test_the_estimate_is_of_all_iterations_and_collectives():
    hlo = HLO.replace(fusion("g", 100), "  %g = f32[1000]{0} all-reduce(%p), replica_groups={{0,1}}\n" + fusion("g", 100))
    memory = SimpleNamespace(**dict.fromkeys(MEMORY, 0) | {"temp_size_in_bytes": 100})
    compiled = SimpleNamespace(as_text=lambda: hlo, memory_analysis=lambda: memory)
    step = CompiledStep(lowered(jax.make_jaxpr(lambda x: x)(1.0).jaxpr), compiled, 1.0)  # ty: ignore
    chip = chips.Chip(memory=99, peak=1.0, clock=10.0, product_rate=1.0, link=500.0)
    account = report(step, chip, resolved("wt103", "tiny").deq)
    forward, adjoint = resolved("wt103", "tiny").deq.max_steps, resolved("wt103", "tiny").deq.backward_max_steps
    assert account["sending"] == forward * 2 * 4000 / (2 * 500)
    assert account["seconds"] == pytest.approx((63 + forward * 118 + adjoint * 40) / 10 + account["sending"])
    assert not account["fits"] and any("does not fit" in line for line in as_lines("train", account))


def test_every_kind_of_step_is_compiled(monkeypatch):
    monkeypatch.setattr("deq_flax.compilation.lower._compile", lambda lowered: (None, 1))
    config = small(MeshOptions(data=2, fsdp=4))
    names = [compiled.step.name for compiled in compile_steps(config, jax.devices(), every_kind=True)]
    assert names == ["train", "train, equilibrium with Jacobian loss", "train, unrolled pretraining", "eval"]
    assert [step.name for step in lower_steps(config, jax.devices())] == ["train", "eval"]


def test_a_fingerprint_is_that_of_the_program():
    """The number of a line that is logged is not compiled, a tolerance and XLA's options are."""
    config = small(MeshOptions(data=2, fsdp=4))
    logged = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every=7))
    looser = dataclasses.replace(config, deq=dataclasses.replace(config.deq, tol=0.5))
    steps = [next(lower_steps(config, jax.devices(), names=["train"])) for config in (config, logged, looser)]
    first, same, other = (step.fingerprint for step in steps)
    assert first == same != other and len(first) == 64
    assert first != dataclasses.replace(steps[0], options={"xla": 1}).fingerprint


@pytest.mark.slow
def test_a_run_that_does_not_fit_ends_with_advice(monkeypatch, capsys):
    chip = dataclasses.replace(chips.CHIPS["v5e"], memory=1e5)
    monkeypatch.setattr(chips, "topology_devices", lambda name: (chip, jax.devices()))
    flags = ["--config.data.batch_size=256", "--topology", "v5e:2x4", "--must_fit"]
    with pytest.raises(SystemExit) as ended:
        cli.run(compile.main, ["compile", "--config", "configs/wt103.py:tiny", *FLAGS, *flags], flag_values=compile._FLAGS)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and "does not fit" in out
    assert err.splitlines()[-1].startswith("error: the train step does not fit: lower data.batch_size")


@pytest.mark.slow
def test_mistakes_are_one_line(monkeypatch):
    cases = {
        "known: v4:2x2x1": ["--config", "configs/wt103.py:tiny", "--topology", "v9:2x2", "--patience", "60"],  # a flag of main
        "--must_fit needs --topology": ["--config", "configs/wt103.py:tiny", "--must_fit"],
        "set model.vocab_size": ["--config", "configs/wt103.py:tiny", "--config.data.name=tokens"],
        "--config is missing": [],
        "must be a multiple of": ["--config", "configs/wt103.py:tiny", "--config.train.accumulate=5"],
    }
    for (message, _), done in zip(cases.items(), commands("compile", [*cases.values()]), strict=True):
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"requirements-tpu\.txt"):
        chips.topology_devices("v5e:2x4")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_every_mesh_compiles_for_a_tpu(mesh):
    axes = [f"--config.mesh.{name}={n}" for name, n in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    # Over `tensor` with the features of the recipe: some of the small ones are split in another way.
    text = ["--config", "configs/wt103.py:tiny", *(FLAGS if mesh[2] == 1 else ()), "--config.data.batch_size=16", *axes]
    done = command("compile", *text, "--topology", "v5e:2x4", "--step", "train", "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    step = json.loads(done.stdout)["steps"]["train"]
    assert step["fits"] and step["parts"].keys() >= {"outside", "forward iteration", "adjoint iteration"}
    assert all(part["cycles"] > 0 for part in step["parts"].values()) and 0 < step["utilization"] < 1
    # Over `tensor`, the sums of a block's two pairs of layers, in both solves; nothing else, and nothing without it.
    found = {kind: total["count"] for kind, total in step["collectives"]["in_loops"].items()}
    assert found == ({"all-reduce": 4} if mesh[2] > 1 else {})
    held = step["bytes"]
    assert step["aliased"] >= 0.95 * (held["parameters"] + held["optimizer"] + held["carry"])


@pytest.mark.slow
@needs_libtpu
def test_stored_bytes_fall_with_fsdp():
    held = {}
    for fsdp in (1, 8):
        chip, devices = chips.topology_devices("v5e:2x4")
        config = small(MeshOptions(data=-1, fsdp=fsdp))
        (step,) = compile_steps(config, devices, names=["train"])
        held[fsdp] = report(step, chip, config.deq)["bytes"]["optimizer"]
    assert held[8] < 0.2 * held[1]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("memory", "share"), [(None, 0.8), (10, 0.2)])
def test_a_direction_is_written_where_the_history_is_on_a_tpu(memory, share):
    """Without `_rows_apart` a write lays its row out anew: 1.9 and 0.38 of the cycles of all reads, not 0.58 and 0.06."""
    _, devices = chips.topology_devices("v5e:2x4")
    state = jax.ShapeDtypeStruct((7, 105_000), "float32", sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    solver = Broyden(1e-3, 35, memory=memory)
    run = jax.jit(lambda z: fixed_point(jax.numpy.tanh, z, solver=solver).value)
    (loop,) = (part for part in parts_of(run.lower(state).compile().as_text()) if part.name == "forward iteration")
    reads = sum(operation.cycles for operation in loop.operations if "bmn" in operation.op_name)
    writes = sum(o.cycles for o in loop.operations if "dynamic_index" in o.op_name or "dynamic_update_index" in o.op_name)
    assert 0 < writes < share * reads
