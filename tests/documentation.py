"""Runs the Python blocks of a page of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def snippets(page: str) -> list[Any]:
    """The Python blocks of a page, compiled."""
    text = (DOCS / page).read_text()
    return [compile(block, page, "exec") for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def run_snippets(page: str, at_least: int = 1, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs every Python block in order, in one namespace, as a user would paste them."""
    blocks = snippets(page)
    assert len(blocks) >= at_least
    namespace = {"__name__": "snippets"} if namespace is None else namespace
    for block in blocks:
        exec(block, namespace)
    return namespace
