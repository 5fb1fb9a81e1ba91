"""The one way to a terminal: whatever is shown passes :func:`visible` first.

Data, run records, answers of models, file names and other libraries' messages may hold codes that a terminal obeys:
they write to the clipboard, retitle the window, move the cursor over lines that stand there, or show text in another
order than it has. Here they are spelt out. Files that are written (rows, JSON) are data and keep every character.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# C0 but for tab and line feed, DEL, C1, line and paragraph separators, embeddings and overrides of direction,
# isolates, and halves of surrogate pairs (which is how Python holds a file name that is not UTF-8). The marks of
# direction U+200E, U+200F and U+061C stay: they turn no other letters round, and such scripts need them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, encoding: str | None = "utf-8") -> str:
    r"""``text`` with what a terminal would obey, and what ``encoding`` lacks, written as escapes; idempotent.

    >>> visible("red: \x1b[31m, other way round: \u202e")
    'red: \\x1b[31m, other way round: \\u202e'
    """
    shown = text if text.isascii() and text.isprintable() else _OBEYED.sub(_escape, text)
    if encoding is None or shown.isascii():
        return shown
    try:
        return shown.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return ascii(shown)[1:-1]


def one_line(text: str) -> str:
    """``text`` for a place where a line end would begin a line that is not its own."""
    return visible(" ".join(text.splitlines()) if "\n" in text or "\r" in text else text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def tell(text: str = "", *, end: str = "\n", flush: bool = False) -> None:
    """Lines on standard output."""
    write(sys.stdout, text + end)
    if flush:
        sys.stdout.flush()


def tell_lines(lines: Iterable[str]) -> None:
    """Lines on standard output, each of which stays one."""
    for line in lines:
        tell(one_line(line))


def tell_json(document: object, *, indent: int = 2) -> None:
    """A JSON document on standard output."""
    tell(json_text(document, indent=indent))


def json_text(document: object, *, indent: int = 2) -> str:
    """JSON in printable ASCII: nothing for a terminal to obey, and whoever parses it gets every character back."""
    return json.dumps(document, indent=indent, ensure_ascii=True).replace("\x7f", "\\u007f")


def complain(text: str) -> None:
    """A line on standard error."""
    write(sys.stderr, text + "\n")


def write(out: TextIO, text: str) -> None:
    """Text to a stream that a person may be looking at."""
    out.write(visible(text, out.encoding or "utf-8"))


class Screen(Console):
    """Rich's console, which shows text as it is (no markup, no names of emoji) and none that a terminal would obey."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"highlight": False, "soft_wrap": True, "markup": False, "emoji": False, **more})

    def render_str(self, text: str, **more: Any) -> Text:
        """Text as it is; rich would leave some codes out without a word."""
        return super().render_str(visible(text, self.encoding), **more)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments as rich makes them; those that are codes of its own have ``control``."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text, self.encoding), style, control)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Log records and warnings of every library, and a traceback that ends the program, pass :func:`visible` too."""
    factory, form = logging.getLogRecordFactory(), warnings.formatwarning
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *args, **named: visible(form(*args, **named))
    sys.excepthook = _show_traceback  # stays: it is needed when this has been left
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return visible(super().getMessage())


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    write(sys.stderr, "".join(traceback.format_exception(kind, error, trace)))
