"""The examples of the READMEs run, and the files that the documentation names exist."""

import re

import pytest

from tests.commands import ROOT


@pytest.mark.parametrize("file", ["README.md", "deq_flax/equilibrium/README.md"])
def test_the_examples_run(file):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, file, "exec"), namespace)


def test_the_numbers_that_are_explained_are_in_the_output_above():
    text = (ROOT / "README.md").read_text()
    outputs = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    explained = re.findall(r"`((?:fwd|bwd) \d[^`]*)`", text)
    assert explained
    for numbers in explained:
        assert numbers in outputs, numbers


PAGES = ["README.md", "benchmarks/README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_every_named_file_exists(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"`((?:configs|benchmarks|docs|tests|deq_flax|launch)/[\w./]*)", text):
        assert (ROOT / name).exists(), name
    links = re.findall(r"\]\(([^)#:]+)", text)
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link


def test_the_readme_points_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert all(f"]({page})" in text for page in PAGES if page != "README.md")
