"""The package as it is installed: what it requires, its recipes, its commands, its version."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement

import deq_flax
from deq_flax.__main__ import COMMANDS, main
from tests.commands import ROOT, command
from tests.test_structure import COMMANDS as MODULES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def required(*extras):
    """The requirements of the package with extras, without the package itself."""
    found = {Requirement(text) for text in PROJECT["project"]["dependencies"]}
    for extra in extras:
        for requirement in map(Requirement, EXTRAS.get(extra, ())):
            found |= required(*requirement.extras) if requirement.name == "deq-flax" else {requirement}
    return found


def in_file(name):
    """The requirements in a file, and in those that it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = {Requirement(line) for line in lines if line and not line.startswith("-r")}
    return found.union(*(in_file(line.split()[1]) for line in lines if line.startswith("-r")))


def test_the_base_install_is_the_library():
    assert {requirement.name for requirement in required()} == {"jax", "flax", "numpy"}


def test_requirements_txt_installs_what_train_and_convert_need():
    assert in_file("requirements.txt") == required("train", "convert")


@pytest.mark.parametrize("extra", ["plot", "text", "docs", "cuda", "tpu", "bench"])
def test_an_extra_and_its_requirements_file_say_the_same(extra):
    base = required("train")
    assert in_file(f"requirements-{extra}.txt") - base == required(extra) - base


def test_the_version_is_stated_once_for_installers_and_once_for_citations():
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "deq_flax/__init__.py"
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == deq_flax.__version__


def test_a_package_that_is_not_installed_is_one_line_that_names_the_extra(monkeypatch, capsys):
    def missing(module, **options):
        raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")

    monkeypatch.setattr("runpy.run_module", missing)
    monkeypatch.setattr("sys.argv", ["deq-flax", "convert"])
    with pytest.raises(SystemExit, match="2"):
        main()
    line = "error: convert needs the package safetensors, which is not installed: pip install 'deq-flax[convert]'\n"
    assert capsys.readouterr().err == line


def test_every_command_has_a_name():
    assert {entry.module for entry in COMMANDS.values()} == {*MODULES}


@pytest.mark.slow
def test_names_of_commands_reach_the_commands():
    help_text = command("__main__").stdout
    assert all(f"\n  {name} " in help_text for name in COMMANDS)
    unknown = command("__main__", "trian")
    assert (unknown.returncode, unknown.stderr) == (2, "error: unknown command 'trian'; did you mean 'train'?\n")
    result = command("__main__", "eval", "--workdir", "none", "--help")
    assert result.returncode == 0 and result.stdout.startswith("Train or evaluate a model.") and "--checkpoint" in result.stdout
    result = command("__main__", "eval", "--config", "digits", "--workdir", "none", "--json")
    assert result.returncode == 2 and "no checkpoint at none" in result.stdout and result.stderr.startswith("error: ")
