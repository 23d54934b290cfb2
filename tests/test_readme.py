"""The code in README runs."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_every_python_block_runs():
    """In order, in one namespace, as a user would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)


def test_every_file_that_it_links_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_every_command_that_it_names_exists():
    """Subcommands of flatops, and make's targets."""
    from flatops.cli import COMMANDS

    text, makefile = README.read_text(), (README.parent / "Makefile").read_text()
    commands = set(re.findall(r"`flatops (\w+)", text))
    assert commands and commands <= set(COMMANDS)
    targets = set(re.findall(r"\bmake (\w+)`?\n|`make (\w+)`", text))
    for target in (a or b for a, b in targets):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
