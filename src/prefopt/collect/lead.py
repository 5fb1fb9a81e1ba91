"""What the lead sees: figures that are counted anew when there is something new, and single items with all votes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from prefopt.collect.text import LETTERS, view_of
from prefopt.studies.agreement import Estimate
from prefopt.studies.annotators import annotators
from prefopt.studies.items import get_item
from prefopt.studies.study import Study
from prefopt.studies.summary import StudySummary, answer_kind, summarise
from prefopt.studies.votes import StoredVote, stored_votes


class Lead:
    """Counting takes a while in a large study: ``patience`` times as long as it took, figures may be old."""

    def __init__(self, study: Study, patience: float = 10.0) -> None:
        self.study, self._patience = study, patience
        self._turn = threading.Lock()
        self._held: tuple[tuple[int, int], float, StudySummary] | None = None

    def summary(self) -> StudySummary:
        """The figures as of now, or as of a moment ago."""
        with self._turn:
            state = self.study.revision()
            started = time.monotonic()
            if self._held is not None and (self._held[0] == state or started < self._held[1]):
                return self._held[2]
            found = summarise(self.study)
            took = time.monotonic() - started
            self._held = state, time.monotonic() + self._patience * took, found
            return found

    def item(self, number: int) -> dict[str, Any] | None:
        """An item in the order of the file, with who said what; None where there is none of that number."""
        with self.study.reading() as connection:
            item = get_item(connection, number) if number < 2**63 else None
            if item is None:
                return None
            names = {p.id: p.name for p in annotators(connection)}
            said = [_said(j, names) for j in stored_votes(connection, number)]
        models = [o.model for o in item.origins]
        return {"item": item, "view": view_of(item, range(item.count)), "said": said, "models": models}


def _said(j: StoredVote, names: dict[int, str]) -> dict[str, Any]:
    order = " > ".join(" = ".join(LETTERS[k] for k in tier) for tier in j.vote.tiers)
    return {
        "name": names[j.annotator],
        "kind": "skip" if j.vote.skipped is not None else answer_kind(j),
        "reason": j.vote.skipped,
        "order": order,
        "shown": " ".join(LETTERS[k] for k in j.shown),
        "rationale": j.vote.rationale,
        "tags": j.vote.tags,
        "seconds": j.seconds if j.active is None else j.active,
    }


WIDTH = 320


def bar(part: float, whole: float, label: str) -> Markup:
    """How much of a whole is there."""
    share = min(1.0, part / whole) if whole else 0.0
    return _svg(
        12,
        label,
        f'<rect class="track" x="0" y="2" width="{WIDTH}" height="8" rx="4"/>'
        f'<rect class="fill" x="0" y="2" width="{share * WIDTH:.1f}" height="8" rx="4"/>',
    )


def bars(named: Sequence[tuple[str, float]], label: str) -> Markup:
    """Numbers side by side, each with its name and value."""
    most = max((value for _, value in named), default=0) or 1
    parts = []
    for row, (name, value) in enumerate(named):
        y = row * 22
        parts.append(
            f'<text x="0" y="{y + 14}">{escape(name)}</text>'
            f'<rect class="fill" x="130" y="{y + 5}" width="{value / most * 140:.1f}" height="11" rx="3"/>'
            f'<text class="number" x="{136 + value / most * 140:.1f}" y="{y + 14}">{value:g}</text>'
        )
    return _svg(22 * len(named), label, "".join(parts))


def interval(e: Estimate, low: float, high: float, mark: float, label: str) -> Markup:
    """A value with its interval on a line from ``low`` to ``high``; ``mark`` is what it is compared with."""

    def x(value: float) -> float:
        return 6 + (min(max(value, low), high) - low) / (high - low) * (WIDTH - 12)

    parts = [
        f'<line class="track" x1="6" x2="{WIDTH - 6}" y1="11" y2="11"/>',
        f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="3" y2="19"/>',
    ]
    if not math.isnan(e.low):
        parts.append(f'<line class="range" x1="{x(e.low):.1f}" x2="{x(e.high):.1f}" y1="11" y2="11"/>')
    if not math.isnan(e.value):
        parts.append(f'<circle class="fill" cx="{x(e.value):.1f}" cy="11" r="5"/>')
    return _svg(22, label, "".join(parts))


def number(value: float, digits: int = 2) -> str:
    """A number for a table, a dash where there is none."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _svg(height: int, label: str, inside: str) -> Markup:
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}">'
        f"{inside}</svg>"
    )
