"""The examples of the README run, the files that the documentation names exist, and every page is on the site."""

import re

import pytest

from tests.commands import ROOT


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_the_numbers_that_are_explained_are_in_the_output_above():
    text = (ROOT / "README.md").read_text()
    outputs = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    explained = re.findall(r"`((?:fwd|bwd) \d[^`]*)`", text)
    assert explained
    for numbers in explained:
        assert numbers in outputs, numbers


PACKAGE = ROOT / "deq_flax"
DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
PAGES = ["README.md", "benchmarks/README.md", "deq_flax/equilibrium/README.md", *DOCS]


@pytest.mark.parametrize("page", PAGES)
def test_every_named_file_exists(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"`((?:configs|benchmarks|docs|tests|deq_flax|launch)/[\w./]*)", text):
        assert (ROOT / name).exists(), name
    links = re.findall(r"\]\(([^)#:]+)", text)
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_architecture_names_every_room_and_no_other():
    tree = [line.strip() for line in ARCHITECTURE.split("```")[1].splitlines() if line.startswith("  ")]
    named = {name for line in tree for name in re.split(r"  +", line)[0].split()}
    rooms = {f"{path.name}/" for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert named == rooms | {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}


def test_the_paths_of_the_architecture_exist_and_are_as_many_as_it_says():
    files = re.findall(r"`([\w/]+\.py)`", ARCHITECTURE)
    assert len(files) > 40
    for file in files:
        assert (ROOT / file).is_file() or (PACKAGE / file).is_file(), file
    rows = re.findall(r"^\| [^|]*: (\d+) \| ([^|]*) \| [^|]* \|$", ARCHITECTURE, re.MULTILINE)
    assert len(rows) == 5
    for count, row in rows:
        assert row.count("`") == 2 * int(count), row


def test_every_page_is_on_the_site():
    """The navigation names every page; files that a hook of the site generates are not in docs/."""
    listed = re.findall(r"([\w/]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {page.removeprefix("docs/") for page in DOCS} | {"tutorial.ipynb"}
    assert pages | {"measurements.md", "changes.md"} == set(listed)
    assert len(listed) == len(set(listed))


def test_the_readme_points_to_pages():
    text = (ROOT / "README.md").read_text()
    for page in ("index", "getting_started", "choosing", "recipes", "configuration", "data", "devices", "checkpoints"):
        assert f"](docs/{page}.md)" in text, page


def rows(page, begin):
    """The cells of the first table after a text, without its head."""
    after = (ROOT / page).read_text().split(begin, 1)[1]
    table = re.split(r"\n\|[-| ]+\|\n", after, maxsplit=1)[1].split("\n\n", 1)[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_readme_shows_the_measured_times():
    """Picard, Anderson, Broyden and the gradient: as in the table of `benchmarks.solvers`, and our overhead."""
    measured = {
        row[0]: [re.sub(r" \(.*", "", cell) for cell in row[1:]] for row in rows("benchmarks/README.md", "begin solvers")
    }
    overhead = {row[0]: row[1] for row in rows("benchmarks/README.md", "Overhead:")}
    for name, row in zip(("picard", "anderson", "broyden", "gradient"), rows("README.md", "## Measured"), strict=True):
        assert row[1:] == [f"{measured[name][0]} ({overhead[name]})", *measured[name][1:]]


def test_the_guide_shows_the_measured_counts():
    """What solvers solve: as in the table of `benchmarks.battery`."""
    measured = {row[1]: row for row in rows("benchmarks/README.md", "begin battery -->") if row[0] == "deq_flax"}
    guide = rows("docs/choosing.md", "python -m benchmarks.battery")
    assert len(guide) == 8
    for solver, _, solved, mean in guide:
        row = measured[solver.replace("Anderson()", "Anderson(memory=6)")]
        assert [solved, mean] == [row[2], row[4]], solver
