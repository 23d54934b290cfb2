"""Runs what a page of docs/ shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def run_snippets(page: str, at_least: int = 1, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every Python block in order, in one namespace, as someone would paste them."""
    text = (Path(__file__).parent.parent / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= at_least
    namespace = {"__name__": "snippets"} if namespace is None else namespace
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace
