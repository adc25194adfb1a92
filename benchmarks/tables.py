"""The tables of README.md and of docs/: each is written by the command that measures it, between two marks with its name."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

README = Path(__file__).parent / "README.md"
DOCS = Path(__file__).parent.parent / "docs"
LANGUAGE = DOCS / "language.md"


def parser(doc: str | None, rounds: int = 0, page: Path = README) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
      doc: the description.
      rounds: default of --rounds; 0 if nothing is timed.
      page: the file that has the place of the tables.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help=f"timings of each case, of which the median is reported ({rounds})"
        )
    place = page.relative_to(DOCS.parent)
    parser.add_argument("--write", nargs="?", const=str(page), help=f"write the tables to their place in {place}, or in FILE")
    return parser


def publish(name: str, text: str, path: str | None) -> None:
    """Print a benchmark's tables and write them to their place in the file at `path`, or to its end if it has no such place."""
    print(text, flush=True)
    if path is None:
        return
    file = Path(path)
    document = file.read_text(encoding="utf-8") if file.exists() else ""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    if begin not in document:
        document += f"\n## {name}\n\n{begin}{end}"
    before, rest = document.split(begin)
    file.write_text(before + begin + text.strip() + "\n" + end + rest.split(end)[1], encoding="utf-8")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean, with the least and the largest behind it where there are several different ones."""
    if not values:
        return "-"
    text, least, largest = form(mean(values)), form(min(values)), form(max(values))
    return text if least == largest else f"{text} ({least} to {largest})"
