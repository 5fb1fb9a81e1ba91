"""The lead's pages: statistics, recomputed when the study changes, and single items with all votes."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from prefopt.collect.views import LETTERS, view_of
from prefopt.studies.annotators import annotators
from prefopt.studies.items import get_item
from prefopt.studies.study import Study
from prefopt.studies.summary import StudySummary, answer_kind, summarise
from prefopt.studies.votes import StoredVote, stored_votes


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


def number(value: float, digits: int = 2) -> str:
    """A number for a table, or a dash for nan."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
