"""The terminal: one maker of consoles, and what to write where its encoding lacks a letter."""

from __future__ import annotations

import codecs
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich is loaded by what prints by it
    from rich.console import Console
    from rich.text import Text

ERRORS = "flatops"  # the name of `spelt` among the codecs' error handlers
WORDS = {"×": "x", "→": "->", "±": "+-", "–": "-", "…": "...", "µ": "u", "²": "^2", "σ": "sigma", "ρ": "rho"}


def spelt(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler for codecs: what our own text has, in ASCII; bytes of a file name as they are; all else as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # os.fsdecode's form of a byte that is not of the file system's encoding
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return WORDS.get(letter) or letter.encode("ascii", "backslashreplace").decode(), error.start + 1


codecs.register_error(ERRORS, spelt)


def take_any_text() -> None:
    """Have standard output and error spell out what their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's take any text
            stream.reconfigure(errors=ERRORS)


def console(**options: Any) -> Console:
    """A console on standard output, in whatever encoding it has, that prints text as it is.

    Args:
        options: rich's.
    """
    from rich.console import Console

    class Spelling(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            """Spelt out before it is laid out, or columns would shift."""
            spelt_out = text.encode(self.encoding, ERRORS).decode(self.encoding, "surrogateescape")
            return super().render_str(spelt_out, **how)

    take_any_text()
    return Spelling(markup=False, emoji=False, highlight=False, **options)


def say(console: Console, *what: Any, style: str | None = None) -> None:
    """Print one below the other; square brackets in text are what they are, on anybody's console.

    Args:
        console: where to print.
        what: lines of text, none of which is broken, for a path that is cannot be copied; or what else rich prints.
        style: of all of it.
    """
    for each in what:
        whole = isinstance(each, str)
        console.print(each, style=style, soft_wrap=whole, markup=False, emoji=False, highlight=False)


def readable(name: str) -> str:
    """A file's name in text that any file can hold: bytes that are not UTF-8 are shown as such."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
