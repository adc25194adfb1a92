"""Directions of imports: the library is usable without the models, the trainer without any task."""

import ast
import importlib.metadata
import re
import subprocess
import sys

import pytest

from tests.commands import ROOT

PACKAGE = ROOT / "deq_flax"
MAY = {
    "errors": set(),
    "untrusted": {"errors"},
    "options": {"errors"},
    "published": set(),
    "equilibrium": set(),
    "nn": set(),
    "models": {"equilibrium", "nn", "errors"},
    "data": {"errors", "untrusted"},
    "task": {"equilibrium"},
    "tasks": {"task", "models", "data", "equilibrium", "nn", "errors"},
    "devices": {"errors"},
    "run_log": {"task", "devices", "equilibrium", "errors", "untrusted"},
    "checkpoints": {"devices", "errors", "untrusted"},
    "train": {"task", "equilibrium", "devices", "checkpoints", "run_log", "options", "errors"},
    "torch_checkpoint": {"nn", "errors", "untrusted"},
    "config": {"options", "errors", "untrusted", "models", "task", "tasks", "devices", "checkpoints", "train"},
    "__main__": {"options"},
    "config_files": {"config", "options", "checkpoints", "errors"},
    "cli": {"options", "config", "config_files", "run_log", "errors"},
    "compilation": {"config", "data", "task", "train", "equilibrium", "devices", "errors"},
    "pretrained": {"config", "config_files", "checkpoints", "models", "train"},
}
"""Room -> the rooms it may import. Not listed: the commands, which may import everything but each other."""

COMMANDS = ("main", "convert", "generate", "plot", "solve", "tokenize", "compile")
PARTS = {"plot": {"plot_model", "plot_evaluation"}}
"""Files that only one command uses."""

LIBRARIES = {
    "errors": set(),
    "untrusted": set(),
    "options": set(),
    "equilibrium": {"jax"},
    "nn": {"jax", "flax", "numpy"},
    "models": {"jax", "flax", "numpy"},
    "data": {"numpy", "grain", "tqdm", "PIL", "sklearn", "array_record", "tokenizers"},
    "torch_checkpoint": {"numpy", "ml_dtypes", "flax", "safetensors"},
}
"""Third-party packages a room may import; the rooms not listed are free."""


def imports(path):
    """(file, module) for every import in a file or below a folder, wherever in the file it stands."""
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are absolute"
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(name):
    return PACKAGE / name if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"


def test_every_room_is_listed():
    parts = {part for some in PARTS.values() for part in some}
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert found - {"__init__"} == {*MAY, *COMMANDS, *parts}


@pytest.mark.parametrize("room", [*MAY, *COMMANDS])
def test_rooms_import_only_what_they_may(room):
    allowed = MAY.get(room, {*MAY, *PARTS.get(room, ())})
    for file, module in imports(room_of(room)):
        if module.startswith("deq_flax."):
            other = module.split(".")[1]
            assert other == room or other in allowed, f"{file} imports {module}"


def test_text_images_and_puzzles_do_not_import_each_other():
    rooms = {path.name for path in (PACKAGE / "data").iterdir() if any(path.glob("*.py"))}
    assert rooms == {"text", "images", "puzzles"}
    for room in rooms:
        for file, module in imports(PACKAGE / "data" / room):
            assert not module.startswith(tuple(f"deq_flax.data.{other}" for other in rooms - {room})), (
                f"{file} imports {module}"
            )


@pytest.mark.parametrize("room", LIBRARIES)
def test_rooms_use_only_their_libraries(room):
    for file, module in imports(room_of(room)):
        top = module.split(".")[0]
        allowed = top in LIBRARIES[room] or top in sys.stdlib_module_names or top == "deq_flax"
        assert allowed or (top == "flax" and file.name == "layer.py"), f"{file} imports {module}"


def test_required_packages_are_imported_without_a_guard():
    """An ImportError is caught only for packages that requirements.txt does not install."""
    required = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    distributions, guarded = importlib.metadata.packages_distributions(), set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Try)):
            caught = {name.id for handler in node.handlers for name in ast.walk(handler) if isinstance(name, ast.Name)}
            if caught & {"ImportError", "ModuleNotFoundError"}:
                names = [
                    getattr(x, "module", None) or x.names[0].name
                    for x in node.body
                    if isinstance(x, ast.Import | ast.ImportFrom)
                ]
                guarded |= {name.split(".")[0] for name in names}
    assert guarded == {"array_record", "matplotlib", "tokenizers"}
    assert not {name for package in guarded for name in distributions.get(package, ())} & required


def test_the_trainer_names_no_layer():
    """Shardings are read from the metadata of a model's Params, never from names of its layers."""
    layers = {"qkv", "softmax", "injection", "embedding", "stem", "post_fuse", "tables_NE", "v_IO", "g_O", "weight_IO"}
    for room in ("train", "devices", "checkpoints", "run_log"):
        for file in sorted((PACKAGE / room).rglob("*.py")):
            tree = ast.parse(file.read_text())
            strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            assert not strings & layers, file


def test_configs_import_only_ml_collections_and_the_config():
    for file, module in imports(ROOT / "configs"):
        shared = module in ("ml_collections.ConfigDict", "deq_flax.config.recipe")
        assert shared or module.startswith("deq_flax.published."), f"{file} imports {module}"


def test_tests_and_benchmarks_do_not_import_each_other():
    for room, other in (("tests", "benchmarks"), ("benchmarks", "tests")):
        for file, module in imports(ROOT / room):
            assert module.split(".")[0] != other, f"{file} imports {module}"


def test_the_library_does_not_import_what_only_training_needs():
    program = "import flax.nnx, sys; before = set(sys.modules); import deq_flax; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    added = {module.split(".")[0] for module in result.stdout.split()}
    assert added - set(sys.stdlib_module_names) == {"deq_flax"}
    rooms = {module.split(".")[1] for module in result.stdout.split() if module.startswith("deq_flax.")}
    assert rooms == {"equilibrium"}
