"""Who may import whom. The library stays usable without the models, the trainer without any task."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "deq_flax"
MAY = {
    "errors": set(),
    "equilibrium": set(),
    "nn": set(),
    "models": {"equilibrium", "nn", "errors"},
    "data": {"errors"},
    "task": {"equilibrium"},
    "tasks": {"task", "models", "data", "equilibrium", "errors", "train"},
    "devices": {"errors"},
    "run_log": {"task", "devices", "errors"},
    "checkpoints": {"devices", "errors", "run_log", "train"},
    "train": {"task", "equilibrium", "devices", "checkpoints", "run_log", "errors"},
    "torch_checkpoint": {"nn", "errors"},
}
LIBRARIES = {
    "equilibrium": {"jax"},
    "data": {"numpy", "grain", "tqdm", "PIL", "sklearn", "array_record"},
    "torch_checkpoint": {"numpy", "ml_dtypes", "flax"},
}
"""Third-party packages a room may import; the rooms not listed are free."""


def imports(room):
    """(file, module) for every import below a room, wherever in the file it stands."""
    root = PACKAGE / room
    for file in sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are absolute"
                yield file, node.module


@pytest.mark.parametrize("room", MAY)
def test_rooms_import_only_what_they_may(room):
    for file, module in imports(room):
        if module.startswith("deq_flax"):
            other = module.split(".")[1] if "." in module else ""
            assert other == room or other in MAY[room], f"{file} imports {module}"


@pytest.mark.parametrize("room", LIBRARIES)
def test_rooms_use_only_their_libraries(room):
    for file, module in imports(room):
        top = module.split(".")[0]
        allowed = top in LIBRARIES[room] or top in sys.stdlib_module_names or top == "deq_flax"
        assert allowed or (top == "flax" and file.name == "layer.py"), f"{file} imports {module}"


def test_configs_import_only_ml_collections():
    for file in (PACKAGE.parent / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert getattr(node, "module", None) == "ml_collections", file


def test_the_library_does_not_import_what_only_training_needs():
    program = "import flax.nnx, sys; before = set(sys.modules); import deq_flax; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    added = {module.split(".")[0] for module in result.stdout.split()}
    assert added - set(sys.stdlib_module_names) == {"deq_flax"}
