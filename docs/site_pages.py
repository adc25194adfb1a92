"""Hook of mkdocs: pages that are made from other files of the repository.

The tutorial is rendered from its notebook, with the outputs that are stored there; measurements and changes are files that lie
elsewhere.
"""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

COPIED = {"measurements.md": "benchmarks/README.md", "changes.md": "CHANGELOG.md"}
"""Page -> file of the repository."""

NOTEBOOK = "tutorial.ipynb"


class NotebookPage(File):
    """A notebook that is a page."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for page, source in COPIED.items():
        files.append(File.generated(config, page, content=(root / source).read_text()))
    markdown, pictures = rendered(json.loads((Path(config.docs_dir) / NOTEBOOK).read_text()))
    files.remove(files.src_uris[NOTEBOOK])
    page = NotebookPage(NOTEBOOK, src_dir=None, dest_dir=config.site_dir, use_directory_urls=config.use_directory_urls)
    page.content_string = markdown
    files.append(page)
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def rendered(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by name."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text" in output:
                parts.append(f"```\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in data:
                name = f"tutorial_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above]({name})")
    return "\n\n".join(parts) + "\n", pictures
