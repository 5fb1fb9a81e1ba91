"""The lead's pages: statistics, recomputed when the study changes, and single items with all votes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from prefopt.collect.views import LETTERS, view_of
from prefopt.studies.agreement import Estimate
from prefopt.studies.annotators import annotators
from prefopt.studies.items import get_item
from prefopt.studies.study import Study
from prefopt.studies.summary import StudySummary, answer_kind, summarise
from prefopt.studies.votes import StoredVote, stored_votes

WIDTH = 320


class Lead:
    """Statistics and items of a study. Statistics may be old by ``patience`` times the time that they take."""

    def __init__(self, study: Study, patience: float = 10.0) -> None:
        self.study, self._patience = study, patience
        self._turn = threading.Lock()
        self._cached: tuple[tuple[int, int], float, StudySummary] | None = None

    def summary(self) -> StudySummary:
        """The statistics, from the cache where the study has not changed or they were computed recently."""
        with self._turn:
            revision = self.study.revision()
            started = time.monotonic()
            if self._cached is not None and (self._cached[0] == revision or started < self._cached[1]):
                return self._cached[2]
            found = summarise(self.study)
            ended = time.monotonic()
            self._cached = revision, ended + self._patience * (ended - started), found
            return found

    def item(self, number: int) -> dict[str, Any] | None:
        """The template values of an item with all its votes, or None for an unknown number."""
        with self.study.reading() as connection:
            item = get_item(connection, number) if number < 2**63 else None
            if item is None:
                return None
            names = {a.id: a.name for a in annotators(connection)}
            votes = [_vote_values(v, names[v.annotator]) for v in stored_votes(connection, number)]
        models = [o.model for o in item.origins]
        return {"item": item, "view": view_of(item, range(item.count)), "votes": votes, "models": models}


def _vote_values(v: StoredVote, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "skip" if v.vote.skipped is not None else answer_kind(v),
        "reason": v.vote.skipped,
        "order": " > ".join(" = ".join(LETTERS[k] for k in tier) for tier in v.vote.tiers),
        "shown": " ".join(LETTERS[k] for k in v.shown),
        "rationale": v.vote.rationale,
        "tags": v.vote.tags,
        "seconds": v.seconds if v.active is None else v.active,
    }


# -- charts --------------------------------------------------------------------------------------------------------


def bar(value: float, total: float, label: str) -> Markup:
    """A progress bar."""
    fraction = min(1.0, value / total) if total else 0.0
    return _svg(
        12,
        label,
        f'<rect class="track" x="0" y="2" width="{WIDTH}" height="8" rx="4"/>',
        f'<rect class="fill" x="0" y="2" width="{fraction * WIDTH:.1f}" height="8" rx="4"/>',
    )


def bars(named: Sequence[tuple[str, float]], label: str) -> Markup:
    """A bar chart of named values."""
    most = max((value for _, value in named), default=0) or 1
    parts = []
    for row, (name, value) in enumerate(named):
        y, width = row * 22, value / most * 140
        parts += [
            f'<text x="0" y="{y + 14}">{escape(name)}</text>',
            f'<rect class="fill" x="130" y="{y + 5}" width="{width:.1f}" height="11" rx="3"/>',
            f'<text class="number" x="{136 + width:.1f}" y="{y + 14}">{value:g}</text>',
        ]
    return _svg(22 * len(named), label, *parts)


def interval(e: Estimate, low: float, high: float, mark: float, label: str) -> Markup:
    """A value with its interval on an axis from ``low`` to ``high``; ``mark`` is the value to compare with."""

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
    return _svg(22, label, *parts)


def number(value: float, digits: int = 2) -> str:
    """A number for a table, or a dash for nan."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def _svg(height: int, label: str, *parts: str) -> Markup:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {size}>{"".join(parts)}</svg>')
