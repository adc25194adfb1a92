"""Extension of griffe, the reader of docstrings: examples are code, though no section `Examples:` announces them."""

import re

import griffe

EXAMPLE = re.compile(r"^>>> .*\n(?:.+\n?)*", re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Puts every paragraph that begins with `>>>` into a fence."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", obj.docstring.value + "\n")
