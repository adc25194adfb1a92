"""The Python of the documentation runs and prints what the page says, and every page is on the site.

A page's blocks are executed in order as one module, in an empty folder. A `text` block right after a `python` block is its
output, but for numbers, which may differ by a tenth. Blocks of other languages are not run: `py` is Python of another library.
"""

import contextlib
import io
import re
import sys
import types

import jax
import pytest

from tests.commands import ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")


def blocks(page):
    """(language, text, whether it follows the block before directly) of every fenced block."""
    end = -1
    for match in BLOCK.finditer(page.read_text()):
        yield match[1], match[2], match.start() == end
        end = match.end()


RUN = sorted(page for page in DOCS.rglob("*.md") if any(language == "python" for language, *_ in blocks(page)))


def same(printed, expected):
    """Whether two outputs agree: their words exactly, their numbers to a tenth."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, expected)]
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (printed, expected)]
    return words[0] == words[1] and numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=1e-3)


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


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)


def test_a_wrong_output_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    for printed, good in [("3 steps 0.52\n", True), ("3 steps 0.7\n", False), ("3 step 0.5\n", False), ("3 steps\n", False)]:
        page.write_text(f"```python\nprint('3 steps', 0.5)\n```\n```text\n{printed}```\n")
        with contextlib.nullcontext() if good else pytest.raises(AssertionError):
            run(page, tmp_path, monkeypatch)
