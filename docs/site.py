"""Makes one site of pages written for GitHub: README.md is the front page, and links out of docs/ become paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

README = Path(__file__).parent.parent / "README.md"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "index.md", content=README.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "index.md":
        markdown = re.sub(r"\]\((?!http|docs/)([^)]+)\)", r"](../\1)", markdown).replace("](docs/", "](")
    markdown = markdown.replace("](../README.md", "](index.md")
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./(?!index)([^)]+)\)", r"\1 (`\2`)", markdown)
