"""mkdocs hooks: pages from files outside of docs/, and links to code as plain text.

Files outside of docs/ (CHANGELOG.md, SECURITY.md, benchmark results, ...) become pages of the site, and the notebook is
rendered to Markdown, so that no page is written twice. Links to files that are no page keep their text only.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PROJECT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
RESULTS = "benchmarks/results"
NOTEBOOK = "tutorials/miniature.ipynb"

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose sources are not Markdown files of docs/."""
    for name in PROJECT_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    for path in sorted((ROOT / RESULTS).glob("*.md")):
        name = f"{RESULTS}/{path.name}"
        page = File.generated(config, name, content=path.read_text())
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    notebook = notebook_to_markdown(json.loads((ROOT / "docs" / NOTEBOOK).read_text()))
    files.append(File.generated(config, "tutorials/notebook.md", content=notebook))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links against the repository: pages stay links, other files become their text."""
    source = page.file.src_uri
    own = source if source in PROJECT_PAGES or source.startswith(RESULTS) else f"docs/{source}"
    here = posixpath.dirname(own)

    def resolve(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        inside = posixpath.normpath(posixpath.join(here, target))
        name = inside.removeprefix("docs/")
        if files.get_file_from_path(name) is None:
            return match[0] if image else text
        link = posixpath.relpath(name, posixpath.dirname(source) or ".")
        return f"{image}[{text}]({link}{anchor})"

    return _LINK.sub(resolve, markdown)


def notebook_to_markdown(notebook: dict[str, Any]) -> str:
    """Markdown of a notebook: text, code, and what the cells print and draw."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts.append(f"```python\n{source}\n```")
            parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="output" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
