"""The Python of the documentation runs and prints what the page says, and the reference has every public name.

A page's blocks are executed in order as one module, in an empty folder. A `text` block right after a `python` block is its
output, equal but for numbers, which may differ by a quarter. Blocks of other languages are not run: `py` is Python of another
library.
"""

import contextlib
import io
import re
import sys
import types

import jax
import pytest

import deq_flax
from deq_flax.data.images.labeled_datasets import LABELED
from deq_flax.data.puzzles.puzzles import PUZZLES
from deq_flax.data.text.corpus import TEXTS
from deq_flax.equilibrium import GRADIENTS, SOLVERS
from deq_flax.models import MODELS
from deq_flax.tasks import TASKS
from tests.commands import ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```([^`\n]*)\n(.*?)^```\n?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")


def blocks(page):
    """(language, text, whether it follows the block before directly) of every fenced block."""
    end = -1
    for match in BLOCK.finditer(page.read_text()):
        yield match[1], match[2], match.start() == end
        end = match.end()


SLOW = ("checkpoints.md", "choosing.md", "getting_started.md", "extending/", "coming_from/")
"""Pages that train for seconds, or repeat the programs of others."""


def runs():
    """The pages that have Python, as parameters of a test."""
    for page in sorted(DOCS.rglob("*.md")):
        if any(language == "python" for language, *_ in blocks(page)):
            name = page.relative_to(DOCS).as_posix()
            yield pytest.param(page, id=name, marks=[pytest.mark.slow] * name.startswith(SLOW))


def same(printed, expected):
    """Whether two outputs agree: their words exactly, their numbers to a quarter."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, expected)]
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (printed, expected)]
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0.25, abs=1e-3)


def run(page, folder, monkeypatch):
    """Execute the blocks of a page, and compare their output."""
    module, file = types.ModuleType(f"page_{page.stem}"), folder / "page.py"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(folder)
    module.__file__ = str(file)
    source, printed = "", ""
    for language, text, follows in blocks(page):
        if language == "python":
            start = source.count("\n")
            source += text
            file.write_text(source)
            with contextlib.redirect_stdout(io.StringIO()) as output, jax.numpy_rank_promotion("allow"):
                exec(compile("\n" * start + text, str(file), "exec"), module.__dict__)
            printed = output.getvalue()
        elif language == "text" and follows:
            assert same(printed, text), f"{page.name} says\n{text}\nbut this is printed:\n{printed}"


@pytest.fixture(autouse=True)
def tables():
    """Pages add lines to the tables of names; the tests after them see the tables as they were."""
    tables = (SOLVERS, GRADIENTS, MODELS, TASKS, TEXTS, LABELED, PUZZLES)
    before = [dict(table) for table in tables]
    yield
    for table, lines in zip(tables, before, strict=True):
        table.clear()
        table.update(lines)


@pytest.mark.parametrize("page", list(runs()))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)


def test_a_wrong_output_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    for printed, good in [("3 steps 0.55\n", True), ("3 steps 0.7\n", False), ("3 step 0.5\n", False), ("3 steps\n", False)]:
        page.write_text(f"```python\nprint('3 steps', 0.5)\n```\n```text\n{printed}```\n")
        with contextlib.nullcontext() if good else pytest.raises(AssertionError):
            run(page, tmp_path, monkeypatch)


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    named = set(re.findall(r"^::: deq_flax[\w.]*\.(\w+)$", text, re.MULTILINE))
    assert set(deq_flax.__all__) - {"__version__"} <= named


SECTIONS = "data|model|deq|loss|optimizer|train|eval|mesh|checkpoint"


def test_every_key_of_a_config_that_a_page_names_exists():
    reference = (DOCS / "configuration.md").read_text()
    parts = re.split(rf"^## ({SECTIONS})\b.*$", reference, flags=re.MULTILINE)[1:]
    known = {
        f"{section}.{key}"
        for section, text in zip(parts[::2], parts[1::2], strict=True)
        for key in re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    }
    assert len(known) > 100
    for page in sorted(DOCS.rglob("*.md")):
        code = " ".join(re.findall(r"`[^`\n]+`|^[^`\n]*--config[^`\n]*$", page.read_text(), re.MULTILINE))
        named = re.findall(rf"(?:(?<=`)|(?<=--config\.))((?:{SECTIONS})\.\w+)(?=[=` .,])", code)
        files = {f"{name}.{end}" for name in SECTIONS.split("|") for end in ("py", "json", "jsonl", "csv")}
        assert set(named) - known - files <= {"train.loop", "train.phases"}, page.name
