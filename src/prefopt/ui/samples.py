"""Samples side by side: the responses of one file, or of two joined by prompt, with search.

Any file of rows with responses will do: ``samples.jsonl`` of a run (before and after training), the output of
``prefopt sample`` and ``prefopt compare``, or data.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefopt.data.comparisons import read_comparisons
from prefopt.data.pictures import ANYWHERE
from prefopt.errors import RunError, UserError
from prefopt.records import Comparison, Message
from prefopt.runs.history import METRICS
from prefopt.ui.runs import files_below

Stamp = tuple[int, int]
"""Time of the last change, and bytes, of a file as it was read."""
PAGE = 20
"""Rows on a page."""
MOST_ROWS = 50_000
"""Rows of a file that are read; a larger one is said to be cut."""
HELD = 8
"""Files kept in memory."""
FIRST = 1 << 20
"""Bytes of the first line that are looked at."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: who gave it, its text, and whether it was judged best."""

    name: str
    text: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, and its responses side by side."""

    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...]
    key: bytes

    def has(self, words: str) -> bool:
        """Whether prompt or responses contain the words, in any case."""
        wanted = words.casefold()
        texts = (*(m.content for m in self.prompt), *(a.text for a in self.answers))
        return any(wanted in text.casefold() for text in texts)


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the rows found: ``of`` them are there, ``start`` come before; ``notes`` say what is not shown."""

    rows: tuple[Row, ...]
    start: int
    of: int
    notes: tuple[str, ...]


@dataclass(slots=True)
class Samples:
    """The files with responses below ``base``."""

    base: Path
    _held: OrderedDict[Path, tuple[Stamp, tuple[list[Row], list[str]]]] = field(default_factory=OrderedDict)
    _sniffed: dict[Path, tuple[Stamp, bool]] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def files(self) -> list[str]:
        """Their paths from ``base``."""
        paths = [path for path in files_below(self.base, [".jsonl"]) if path.name != METRICS]
        with self._turn:
            for gone in self._sniffed.keys() - set(paths):
                del self._sniffed[gone]
            return [str(path.relative_to(self.base)) for path in paths if self._has_responses(path)]

    def page(self, names: Sequence[str], words: str, start: int) -> Page:
        """The rows that contain ``words``, from number ``start`` on. Two files are joined by prompt. Raises
        :class:`RunError` for a file that is not among :meth:`files` and :class:`UserError` for one that cannot be
        read."""
        known = self.files()
        if wrong := [name for name in names if name not in known]:
            raise RunError(f"{wrong[0]}: no file with responses below {self.base}; choose one of the list")
        read = [self._read(self.base / name) for name in names]
        notes = [note for _, several in read for note in several]
        if len(read) == 2:
            rows, missing = joined(read[0][0], read[1][0], names)
            notes += [f"{missing} prompts are in one of the files alone and are left out"] if missing else []
        else:
            rows = read[0][0] if read else []
        found = [row for row in rows if row.has(words)] if words else rows
        start = max(0, min(start, len(found) - 1)) // PAGE * PAGE
        return Page(tuple(found[start : start + PAGE]), start, len(found), tuple(notes))

    def _has_responses(self, path: Path) -> bool:
        """Whether the first row has responses, told by its keys."""
        try:
            stamp = _stamp(path)
            if (known := self._sniffed.get(path)) is None or known[0] != stamp:
                with path.open("rb") as file:
                    row = json.loads(file.readline(FIRST))
                known = self._sniffed[path] = stamp, isinstance(row, dict) and bool(KEYS & row.keys())
            return known[1]
        except (OSError, ValueError):
            return False

    def _read(self, path: Path) -> tuple[list[Row], list[str]]:
        stamp = _stamp(path)
        with self._turn:
            if (known := self._held.get(path)) is None or known[0] != stamp:
                known = self._held[path] = stamp, _read_file(path)
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(path)
            return known[1]


def _stamp(path: Path) -> Stamp:
    about = path.stat()
    return about.st_mtime_ns, about.st_size


KEYS = {"responses", "chosen", "rejected", "completion", "response", "output", "messages", "conversations"}
"""Columns of rows that have responses."""


def _read_file(path: Path) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    refused = 0
    reading = read_comparisons(path, pictures=ANYWHERE)
    for number, row in enumerate(reading):
        if number >= MOST_ROWS:
            return rows, [f"{path.name}: the first {MOST_ROWS:,} of {reading.count:,} rows are shown"]
        if isinstance(row, Comparison) and row.responses:
            rows.append(row_of(row))
        else:
            refused += 1
    return rows, [f"{path.name}: {refused} rows without responses are left out"] if refused else []


def row_of(c: Comparison) -> Row:
    """A row of data as it is shown."""
    models = c.extra.get("models")
    names = [str(m) for m in models] if isinstance(models, list) and len(models) == len(c.responses) else []
    pair = len(c.responses) == 2 and len(c.tiers) == 2 and not names
    best = set(c.tiers[0]) if len(c.tiers) > 1 else set()
    answers = []
    for k, response in enumerate(c.responses):
        name = names[k] if names else ("chosen" if k in best else "rejected") if pair else f"response {k + 1}"
        answers.append(Answer(name, response.text, k in best))
    return Row(c.prompt, tuple(answers), c.prompt_key)


def joined(first: Sequence[Row], second: Sequence[Row], names: Sequence[str]) -> tuple[list[Row], int]:
    """Rows of two files with the same prompt, in the order of the first, and how many prompts have no partner."""
    others: dict[bytes, list[Row]] = {}
    for row in second:
        others.setdefault(row.key, []).append(row)
    found, alone = [], 0
    for row in first:
        if not others.get(row.key):
            alone += 1
            continue
        partner = others[row.key].pop(0)
        answers = [_of(name, a) for name, r in zip(names, (row, partner), strict=True) for a in r.answers]
        found.append(Row(row.prompt, tuple(answers), row.key))
    return found, alone + sum(map(len, others.values()))


def _of(name: str, answer: Answer) -> Answer:
    """An answer under the name of its file."""
    more = "" if answer.name == "response 1" else f": {answer.name}"
    return Answer(f"{name}{more}", answer.text, answer.best)


def spans(text: str, words: str) -> Iterator[tuple[str, bool]]:
    """A text in pieces, those that were searched for marked.

    >>> list(spans("The cat and the dog", "THE"))
    [('The', True), (' cat and ', False), ('the', True), (' dog', False)]
    """
    parts = re.split(f"({re.escape(words)})", text, flags=re.I) if words else [text]
    yield from ((part, n % 2 == 1) for n, part in enumerate(parts) if part)


def readable(samples: Samples, names: Sequence[str], words: str, start: int) -> tuple[Page | None, str]:
    """A page, or in one line why there is none."""
    try:
        return samples.page(names, words, start), ""
    except (UserError, OSError) as error:
        return None, str(error)
