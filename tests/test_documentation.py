"""Every Python block of every page runs, and every link has a target."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from documentation import DOCS, run_snippets, snippets
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from workers import run

import flatops

HERE = ("choosing.md", "faq.md", "kernels.md", "quickstart.md")


@pytest.mark.parametrize("page", HERE)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_snippets(page)


def _distributed():
    for block in snippets("distributed.md"):
        torch.manual_seed(0)
        namespace = {
            "torch": torch,
            "flatops": flatops,
            "fully_shard": fully_shard,
            "DistributedDataParallel": DistributedDataParallel,
        }
        namespace |= {"net": torch.nn.Linear(8, 3), "loss_fn": torch.nn.functional.cross_entropy}
        exec(block, namespace | {"x": torch.randn(4, 8), "y": torch.randint(3, (4,))})


def test_several_processes():
    run(_distributed, 2)


def test_no_page_is_left_out():
    """Pages of integrations run in the tests of those integrations, where they may be skipped."""
    elsewhere = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for path in DOCS.rglob("*.md"):
        page = str(path.relative_to(DOCS))
        assert not snippets(page) or page in HERE or f'snippets("{page}"' in elsewhere, page


@pytest.mark.parametrize("page", sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")))
def test_links(page):
    text = (DOCS / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
        assert ((DOCS / page).parent / target).exists(), target
