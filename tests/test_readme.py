"""The examples of the READMEs run as they stand."""

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


def test_every_file_that_is_pointed_to_exists():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:configs|benchmarks|docs|tests|deq_flax|launch)/[\w./]*)", text)
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name
