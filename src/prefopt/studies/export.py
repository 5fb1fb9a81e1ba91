"""Convert votes to training rows in the canonical layout: pairs, rankings or soft labels, with their provenance. Gold
items are left out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from prefopt.errors import DataError, StudyError
from prefopt.records import tiers_of_signs
from prefopt.studies.annotators import Annotator, annotators
from prefopt.studies.items import Item, all_items
from prefopt.studies.study import Study
from prefopt.studies.votes import StoredVote, stored_votes

ExportedRow = dict[str, Any]
Pair = tuple[int, int]
RowParts = Iterator[tuple[ExportedRow, Sequence[int]]]
"""Values of a row, and the indices of its responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How votes become rows.

    - ``form``: ``pairs``, a row for each two responses of which one is preferred; ``rankings``, a row for each item;
      ``soft``, a row for each item in which every pair is weighted by its fraction of votes.
    - ``disagreement``: the ``majority`` of votes, only ``unanimous`` ones, or a row for ``every`` vote. Soft labels
      use all votes.
    - ``ties``: not counted (``drop``), half a vote for each side (``half``), or, where most votes are ties, a tie in
      the row (``keep``; for soft labels the same as ``half``).
    - ``all_bad``: votes that all responses are bad are left out (``drop``) or counted as ties (``tie``).
    - ``min_votes``: items with fewer votes are left out. ``exclude``: pseudonyms whose votes are left out.
    - ``provenance``: rows contain study, item, models, sampling, source and votes; otherwise the known models alone.
    """

    form: Literal["pairs", "rankings", "soft"] = "soft"
    disagreement: Literal["majority", "unanimous", "every"] = "majority"
    ties: Literal["drop", "half", "keep"] = "half"
    all_bad: Literal["drop", "tie"] = "drop"
    min_votes: int = 1
    exclude: frozenset[str] = frozenset()
    provenance: bool = True


@dataclass(slots=True)
class Exported:
    """Rows in the order of the items, the keys of their prompts [rows], and how many votes were used or left out."""

    rows: list[ExportedRow] = field(default_factory=list)
    prompt_keys: list[bytes] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        return [f"{count:,} {what}" for what, count in self.counts.items()]


def export_rows(study: Study, options: ExportOptions | None = None) -> Exported:
    """The rows of all votes in force, from one view of the study."""
    with study.reading() as connection:
        exporter = _Exporter(options or ExportOptions(), study.settings.id, annotators(connection))
        items = list(all_items(connection))
        votes: dict[int, list[StoredVote]] = defaultdict(list)
        for v in stored_votes(connection):
            votes[v.item].append(v)
    for item in items:
        if item.gold is None:
            exporter.add(item, votes[item.id])
    return exporter.found


def vote_rows(study: Study, exclude: Collection[str] = ()) -> Iterator[ExportedRow]:
    """Every vote and skip in force, gold items included, as a flat row by item and time.

    ``order`` is best first by the numbers of the responses, such as ``1 > 0 = 2``, ``shown`` the order on the page,
    ``seconds`` those in which the page was visible where the browser said so. ``exclude`` are pseudonyms.
    """
    with study.reading() as connection:
        everyone = {a.id: a.pseudonym for a in annotators(connection)}
        items = {item.id: item for item in all_items(connection)}
        found = list(stored_votes(connection))
    for v in found:
        if everyone[v.annotator] in exclude:
            continue
        item, vote = items[v.item], v.vote
        yield {
            "item": v.item,
            "source": item.file,
            "source_row": item.file_row,
            "gold": item.gold is not None,
            "annotator": everyone[v.annotator],
            "at": v.at,
            "seconds": v.seconds if v.active is None else v.active,
            "order": " > ".join(" = ".join(map(str, tier)) for tier in vote.tiers),
            "shown": " ".join(map(str, v.shown)),
            "strength": vote.strength,
            "all_bad": vote.all_bad,
            "skipped": vote.skipped,
            "correct": vote.matches(item.gold) if item.gold is not None and vote.skipped is None else None,
            "tags": ", ".join(vote.tags),
            "rationale": vote.rationale,
            "models": ", ".join(origin.model or "unknown" for origin in item.origins),
        }


class _Exporter:
    def __init__(self, options: ExportOptions, study: str, everyone: Sequence[Annotator]) -> None:
        self.options, self.study, self.found = options, study, Exported()
        self.counts = self.found.counts
        self.pseudonyms = {a.id: a.pseudonym for a in everyone}

    def add(self, item: Item, votes: Sequence[StoredVote]) -> None:
        options, counts = self.options, self.counts
        usable = [v for v in votes if self._usable(v)]
        if not usable:
            counts["items without a usable vote left out" if votes else "items without votes left out"] += 1
            return
        if len(usable) < options.min_votes:
            counts["items with too few votes left out (--min-votes)"] += 1
            return
        counts["votes used"] += len(usable)
        convert = {"pairs": self._pairs, "rankings": self._rankings, "soft": self._soft}[options.form]
        every = options.disagreement == "every" and options.form != "soft"
        for group in [[v] for v in usable] if every else [usable]:
            for values, indices in convert(item, group):
                row = {name: value for name, value in item.row.items() if name != "overlap"}
                row |= {"responses": [item.row["responses"][k] for k in indices]} | values
                if options.provenance:
                    row |= self._provenance(item, indices, group)
                elif any(item.origins[k].model is not None for k in indices):
                    row["models"] = [item.origins[k].model for k in indices]
                self.found.rows.append(row)
                self.found.prompt_keys.append(item.prompt_key)
                counts["rows"] += 1

    def _usable(self, v: StoredVote) -> bool:
        if self.pseudonyms[v.annotator] in self.options.exclude:
            self.counts["votes of excluded annotators left out"] += 1
        elif v.vote.skipped is not None:
            self.counts["skips left out"] += 1
        elif not v.vote.tiers and self.options.all_bad == "drop":
            self.counts["votes that all responses are bad left out (--all-bad)"] += 1
        else:
            return True
        return False

    def _majorities(self, item: Item, group: Sequence[StoredVote]) -> dict[Pair, int]:
        """For each decided pair 1 where the first is preferred, -1 where the second is, 0 for a tie."""
        options, found = self.options, {}
        for pair, (first, second, ties) in votes_by_pair(item, group).items():
            if options.disagreement == "unanimous" and max(first, second, ties) < first + second + ties:
                self.counts["pairs without a unanimous vote left out (--disagreement unanimous)"] += 1
            elif options.ties == "keep" and ties and ties >= max(first, second):
                found[pair] = 0
            elif first != second:  # half a vote for each side changes nothing here
                found[pair] = 1 if first > second else -1
            elif first:
                self.counts["pairs with equally many votes for both sides left out"] += 1
            else:
                self.counts["pairs that are ties left out (--ties)"] += 1
        return found

    def _pairs(self, item: Item, group: Sequence[StoredVote]) -> RowParts:
        for (i, k), sign in self._majorities(item, group).items():
            yield {"tiers": [[0], [1]] if sign else [[0, 1]]}, (i, k) if sign >= 0 else (k, i)

    def _rankings(self, item: Item, group: Sequence[StoredVote]) -> RowParts:
        signs = self._majorities(item, group)
        if tiers := tiers_of_signs(signs, item.count):
            yield {"tiers": [list(tier) for tier in tiers]}, range(item.count)
        elif votes := [[i, k, 1.0] if sign > 0 else [k, i, 1.0] for (i, k), sign in signs.items() if sign]:
            self.counts["rows whose votes form no order of all responses, written as pairs"] += 1
            yield {"votes": votes}, range(item.count)
        else:
            self.counts["items without a decided pair left out"] += 1

    def _soft(self, item: Item, group: Sequence[StoredVote]) -> RowParts:
        votes: list[list[float]] = []
        signs: dict[Pair, int] = {}
        for (i, k), (first, second, ties) in votes_by_pair(item, group).items():
            half = ties / 2 if self.options.ties != "drop" else 0
            total = first + second + 2 * half
            if not total:
                self.counts["pairs that are ties left out (--ties)"] += 1
                continue
            votes += [[i, k, (first + half) / total]] if first + half else []
            votes += [[k, i, (second + half) / total]] if second + half else []
            signs[i, k] = (first > second) - (first < second)
        if not votes:
            self.counts["items without a decided pair left out"] += 1
            return
        # Methods that need an order use the majority's, where there is one.
        tiers = tiers_of_signs(signs, item.count)
        order = {"tiers": [list(tier) for tier in tiers]} if tiers else {}
        yield order | {"votes": votes}, range(item.count)

    def _provenance(self, item: Item, indices: Sequence[int], group: Sequence[StoredVote]) -> ExportedRow:
        annotations = []
        for v in group:
            annotation = {"annotator": self.pseudonyms[v.annotator], "shown": list(v.shown), "seconds": v.seconds}
            active = {} if v.active is None else {"active_seconds": v.active}
            annotations.append(v.vote.to_json() | annotation | {"at": v.at} | active)
        origins = [item.origins[k] for k in indices]
        return {
            "study": self.study,
            "item": item.id,
            "numbers": list(indices),
            "models": [o.model for o in origins],
            "sampling": [None if o.sampling is None else dict(o.sampling) for o in origins],
            "source": item.file,
            "source_row": item.file_row,
            "annotations": annotations,
        }


def votes_by_pair(item: Item, group: Sequence[StoredVote]) -> dict[Pair, tuple[int, int, int]]:
    """For each judged pair of responses the votes for the first, for the second, and for a tie."""
    found: dict[Pair, list[int]] = {}
    for v in group:
        pairs = v.vote.pairs or tuple((i, k, 0) for i, k in combinations(range(item.count), 2))
        for i, k, sign in pairs:
            found.setdefault((i, k), [0, 0, 0])[{1: 0, -1: 1, 0: 2}[sign]] += 1
    return {pair: (cell[0], cell[1], cell[2]) for pair, cell in sorted(found.items())}


@dataclass(frozen=True, slots=True)
class StudyRows:
    """The rows of a study as training data: prompt, responses, votes (soft labels), tiers where they form an order, and
    models. The study may be served meanwhile."""

    path: Path

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        return iter(self._read().rows)

    def digest(self) -> str:
        """SHA-256 of the rows: the bytes of the file change with every page that is opened."""
        digest = hashlib.sha256()
        for row in self._read().rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """How many votes were used or left out, as text."""
        lines = "; ".join(line for line in self._read().lines() if not line.endswith(" rows"))
        return [f"{self.path}: {lines}"] if lines else []

    def _read(self) -> Exported:
        try:
            with Study(self.path, read_only=True) as study:
                revision = study.revision()
            return _exported(self.path, study.settings.id, revision)
        except StudyError as error:
            raise DataError(str(error).removeprefix(f"{self.path}: "), file=str(self.path)) from None


@lru_cache(maxsize=2)  # a run asks for notes, digest and rows one after another
def _exported(path: Path, study: str, revision: tuple[int, int]) -> Exported:
    with Study(path, read_only=True) as opened:
        return export_rows(opened, ExportOptions(form="soft", ties="half", all_bad="drop", provenance=False))
