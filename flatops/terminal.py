"""Terminal output: consoles, and replacements for characters that a terminal's encoding lacks."""

from __future__ import annotations

import codecs
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # rich is slow to import
    from rich.console import Console
    from rich.text import Text

ERRORS = "flatops"  # the name of the codec error handler `replace`
WORDS = {"×": "x", "→": "->", "±": "+-", "–": "-", "…": "...", "µ": "u", "²": "^2", "σ": "sigma", "ρ": "rho"}


def replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec error handler: WORDS for our own characters, the bytes of undecodable file names, otherwise escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # os.fsdecode's form of an undecodable byte
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return WORDS.get(character) or character.encode("ascii", "backslashreplace").decode(), error.start + 1


codecs.register_error(ERRORS, replace)


def replace_unencodable() -> None:
    """Make standard output and error replace characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams accept any text
            stream.reconfigure(errors=ERRORS)


def console(**options: Any) -> Console:
    """A rich Console on standard output that prints text literally in any encoding; `options` are rich's."""
    from rich.console import Console

    class AnyEncoding(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            # Before the layout, or replacements would shift columns.
            encodable = text.encode(self.encoding, ERRORS).decode(self.encoding, "surrogateescape")
            return super().render_str(encodable, **how)

    replace_unencodable()
    return AnyEncoding(markup=False, emoji=False, highlight=False, **options)


def say(console: Console, *items: Any, style: str | None = None) -> None:
    """Print text and rich renderables, each on a new line; text literally, and not wrapped: paths can be copied."""
    for item in items:
        is_text = isinstance(item, str)
        console.print(item, style=style, soft_wrap=is_text, markup=False, emoji=False, highlight=False)


def readable(name: str) -> str:
    """A file name as valid UTF-8; undecodable bytes become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
