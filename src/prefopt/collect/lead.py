"""What the lead sees: figures that are counted anew when there is something new, and single items with all votes."""

from __future__ import annotations

import threading
import time
from typing import Any

from prefopt.collect.view import LETTERS, view_of
from prefopt.studies.items import get_item
from prefopt.studies.judgements import Judgement, judgements
from prefopt.studies.people import annotators
from prefopt.studies.study import Study
from prefopt.studies.summary import Summary, answer, summarise


class Lead:
    """Counting takes a while in a large study: ``patience`` times as long as it took, figures may be old."""

    def __init__(self, study: Study, patience: float = 10.0) -> None:
        self.study, self._patience = study, patience
        self._turn = threading.Lock()
        self._held: tuple[int, float, Summary] | None = None

    def summary(self) -> Summary:
        """The figures as of now, or as of a moment ago."""
        with self._turn:
            with self.study.reading() as connection:
                query = "SELECT coalesce(max(id), 0) + (SELECT count(*) FROM item) FROM event"
                state = int(connection.execute(query).fetchone()[0])
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
            said = [_said(j, names) for j in judgements(connection, number)]
        models = [o.model for o in item.origins]
        return {"item": item, "view": view_of(item, range(item.count)), "said": said, "models": models}


def _said(j: Judgement, names: dict[int, str]) -> dict[str, Any]:
    order = " > ".join(" = ".join(LETTERS[k] for k in tier) for tier in j.vote.tiers)
    return {
        "name": names[j.annotator],
        "kind": "skip" if j.vote.skipped is not None else answer(j),
        "reason": j.vote.skipped,
        "order": order,
        "shown": " ".join(LETTERS[k] for k in j.shown),
        "rationale": j.vote.rationale,
        "tags": j.vote.tags,
        "seconds": j.seconds if j.active is None else j.active,
    }
