"""Prompts from files of any layout, or from the lines of a text file, as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prefopt.data.chat.render import Renderer
from prefopt.data.comparisons import open_comparisons
from prefopt.data.files.content import DAMAGED, damaged, look
from prefopt.data.files.sources import Source
from prefopt.data.group import IntArray
from prefopt.data.validate import Problem, check, convert, describe, refuse, refused_rows
from prefopt.errors import DataError
from prefopt.records import Comparison, Message

TEXT = ".txt"
Lines = Literal["user", "text"]


@dataclass(slots=True)
class PromptSet:
    """Prompts in order: ``rows[i]`` without responses, and its token ids ``ids[i]``. What became of every row is
    counted: ``len(rows) + refused_rows(problems) == read``."""

    rows: list[Comparison] = field(default_factory=list)
    ids: list[IntArray] = field(default_factory=list)
    read: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """Lines that a run prints."""
        lines = [f"{self.read} read, {len(self.rows)} kept, {refused_rows(self.problems)} refused"]
        if self.problems:
            lines.append(f"refused: {describe(self.problems)}")
        return lines + self.notes


class PromptReader:
    """Reads and renders; ``context`` is how many positions the model has, of which a prompt must leave ``room``."""

    def __init__(
        self, renderer: Renderer, *, context: int | None, lines: Lines, on_bad_row: str, room: int = 1
    ) -> None:
        self._renderer, self._context, self._room = renderer, context, room
        self._lines, self._on_bad_row = lines, on_bad_row
        self.found = PromptSet()

    def read(
        self, sources: Sequence[Source], *, format: str | None = None, columns: Sequence[str] | None = None
    ) -> PromptSet:
        """All sources. Raises :class:`DataError` for bad rows unless they are to be skipped, and where none is left."""
        for source in sources:
            self.found.notes += source.notes
            if source.path is not None and source.suffix == TEXT:
                self._take(self._text_rows(source))
                continue
            reading = open_comparisons(source, format=format, columns=columns)
            self._take(reading)
            self.found.notes += reading.notes
        return self._finish()

    def take(self, rows: Iterable[Comparison | Problem], notes: Sequence[str] = ()) -> PromptSet:
        """Rows that are in memory."""
        self._take(rows)
        self.found.notes += notes
        return self._finish()

    def _finish(self) -> PromptSet:
        found = self.found
        found.notes += self._renderer.notes
        if found.problems and self._on_bad_row == "refuse":
            raise refuse(found.problems, found.read)
        if not found.rows:
            why = f": {describe(found.problems)}" if found.problems else ""
            raise DataError(f"none of the {found.read} rows of --prompts can be used{why}")
        return found

    def _take(self, rows: Iterable[Comparison | Problem]) -> None:
        good: list[Comparison] = []
        for row in rows:
            self.found.read += 1
            wrong = [row] if isinstance(row, Problem) else check(row, "prompts")
            bare = row if isinstance(row, Problem) else convert(row, "prompts")
            if isinstance(bare, Problem) or wrong:
                self.found.problems += wrong
            else:
                good.append(bare)
        for bare, ids in zip(good, self._renderer.prompts(good), strict=True):
            if isinstance(ids, Problem):
                self.found.problems.append(ids)
            elif self._context is not None and len(ids) + self._room > self._context:
                more = "" if self._room == 1 else f" --max-new-tokens {self._room} more are wanted, and"
                what = f"has {len(ids)} tokens,{more or ' and'} the model's context is {self._context}"
                self.found.problems.append(Problem("prompt too long", bare.row, what, bare.file))
            else:
                self.found.rows.append(bare)
                self.found.ids.append(ids)

    def _text_rows(self, source: Source) -> Iterator[Comparison]:
        assert source.path is not None
        try:
            with look(source.path).opened() as file:
                text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 (byte {error.start + 1}); save it as UTF-8", file=source.name) from None
        except DAMAGED as error:
            raise damaged(error, source.name) from None
        empty = 0
        for number, line in enumerate(text.split("\n"), 1):
            words = line.rstrip("\r")
            if words.strip():
                yield Comparison((Message("user", words),), (), (), number, source.name, self._lines == "text")
            else:
                empty += 1
        empty -= text.endswith("\n") or not text  # what follows the last line end is no line
        if empty:
            self.found.notes.append(f"{source.name}: {empty} empty line{'s' * (empty > 1)} passed over")
        kind = "the user's turns" if self._lines == "user" else "text to continue, without a chat template"
        self.found.notes.append(f"{source.name}: its lines are taken as {kind} (--lines)")
