"""Results that print as a small table, as text and in a notebook.

>>> class Found(Shown):
...     def table(self):
...         return "found: 2 rows", [("loss", "0.5"), ("held-out loss", "0.6")]
>>> Found()
found: 2 rows
  loss           0.5
  held-out loss  0.6
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from html import escape

from prefopt.core.terminal import visible


class Shown(ABC):
    """Subclasses give a title and rows of a name and a value; a row without a name is a line of text."""

    __slots__ = ()

    @abstractmethod
    def table(self) -> tuple[str, Sequence[tuple[str, str]]]:
        """The title, and the rows."""

    def __repr__(self) -> str:
        title, rows = self.table()
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([title, *(f"  {name:<{width}}  {value}" if name else f"  {value}" for name, value in rows)])

    def _repr_html_(self) -> str:
        title, rows = self.table()
        cells = "".join(
            f'<tr><th style="text-align:left">{_html(name)}</th><td style="text-align:left">{_html(value)}</td></tr>'
            if name
            else f'<tr><td colspan="2" style="text-align:left">{_html(value)}</td></tr>'
            for name, value in rows
        )
        return f'<table><caption style="text-align:left">{_html(title)}</caption>{cells}</table>'


class ShownLines(Shown):
    """Results that a command prints in lines: the first is the title. Subclasses give the lines."""

    __slots__ = ()

    @abstractmethod
    def lines(self) -> Iterable[str]:
        """What the command prints."""

    def table(self) -> tuple[str, list[tuple[str, str]]]:
        """The lines, for a reader of Python."""
        first, *others = self.lines()
        return first, [("", line) for line in others]


def _html(text: str) -> str:
    return escape(visible(text))
