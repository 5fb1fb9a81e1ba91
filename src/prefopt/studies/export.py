"""From votes to rows that train: pairs, rankings, or soft labels, with all that is known of how they came about.

Rows are in the canonical layout of ``prefopt data layouts``. Gold items are no data and are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from prefopt.errors import DataError, StudyError
from prefopt.studies.annotators import Annotator, annotators
from prefopt.studies.items import Item, Tiers, all_items
from prefopt.studies.study import Study
from prefopt.studies.votes import Judgement, judgements

Form = Literal["pairs", "rankings", "soft"]
Row = dict[str, Any]
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How votes become rows.

    - ``form``: ``pairs``, a row for each two responses of which one is preferred; ``rankings``, a row for each item;
      ``soft``, a row for each item in which every pair is weighed by its share of votes.
    - ``disagreement``: what most people say (``majority``), only what all say (``unanimous``), or a row for every vote
      (``every``). Soft labels are made of all votes.
    - ``ties``: not counted (``drop``), half a vote for each side (``half``), or, where most say so, a tie in the row
      (``keep``; for soft labels the same as ``half``).
    - ``all_bad``: votes that no response is any good are left out (``drop``) or ties (``tie``).
    - ``min_votes``: items with fewer votes are left out. ``exclude``: pseudonyms whose votes are left out.
    - ``provenance``: rows tell who said what of which responses, else the models alone, where they are known.
    """

    form: Form = "soft"
    disagreement: Literal["majority", "unanimous", "every"] = "majority"
    ties: Literal["drop", "half", "keep"] = "half"
    all_bad: Literal["drop", "tie"] = "drop"
    min_votes: int = 1
    exclude: frozenset[str] = frozenset()
    provenance: bool = True


@dataclass(slots=True)
class Exported:
    """The rows, in the order of the items; ``prompt_keys`` [rows] name their prompts, ``counts`` what came of votes."""

    rows: list[Row] = field(default_factory=list)
    prompt_keys: list[bytes] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """What happened, in words."""
        return [f"{count:,} {what}" for what, count in self.counts.items()]


def export_rows(study: Study, how: How | None = None) -> Exported:
    """All rows that the votes in force give, at one moment."""
    how = how or How()
    found = Exported()
    with study.reading() as connection:
        people = {p.id: p for p in annotators(connection)}
        votes = groupby(judgements(connection), key=lambda j: j.item)
        held: tuple[int, list[Judgement]] | None = None
        for item in all_items(connection):
            while held is None or held[0] < item.id:
                number, group = next(votes, (None, iter(())))
                if number is None:
                    break
                held = number, list(group)
            said = held[1] if held and held[0] == item.id else []
            if item.gold is None:
                _export_item(item, said, people, how, study.settings.id, found)
    return found


def _export_item(
    item: Item, said: Sequence[Judgement], people: dict[int, Annotator], how: How, study: str, found: Exported
) -> None:
    counts = found.counts
    usable = []
    for j in said:
        if people[j.annotator].pseudonym in how.exclude:
            counts["votes of excluded annotators left out"] += 1
        elif j.vote.skipped is not None:
            counts["skips left out"] += 1
        elif not j.vote.tiers and how.all_bad == "drop":
            counts["votes that all are bad left out (--all-bad)"] += 1
        else:
            usable.append(j)
    if not usable:
        counts["items without a usable vote left out" if said else "items without votes left out"] += 1
        return
    if len(usable) < how.min_votes:
        counts["items with too few votes left out (--min-votes)"] += 1
        return
    counts["votes used"] += len(usable)
    makers = {"pairs": _pairs, "rankings": _rankings, "soft": _soft}
    groups = [[j] for j in usable] if how.disagreement == "every" and how.form != "soft" else [usable]
    for group in groups:
        for row, numbers in makers[how.form](item, group, how, counts):
            if how.provenance:
                row |= _provenance(item, numbers, group, people, study)
            elif any(item.origins[k].model is not None for k in numbers):
                row["models"] = [item.origins[k].model for k in numbers]
            found.rows.append(row)
            found.prompt_keys.append(item.prompt_key)
            counts["rows"] += 1


def _tally(item: Item, group: Sequence[Judgement]) -> dict[Pair, tuple[int, int, int]]:
    """For each pair of responses that was judged: votes for the first, for the second, and ties."""
    found: dict[Pair, list[int]] = {}
    for j in group:
        pairs = j.vote.pairs or tuple((i, k, 0) for i in range(item.count) for k in range(i + 1, item.count))
        for i, k, sign in pairs:
            found.setdefault((i, k), [0, 0, 0])[2 if sign == 0 else 0 if sign > 0 else 1] += 1
    return {pair: (cell[0], cell[1], cell[2]) for pair, cell in sorted(found.items())}


def _verdicts(item: Item, group: Sequence[Judgement], how: How, counts: Counter[str]) -> dict[Pair, int]:
    """What the group says of each pair: 1 for the first, -1 for the second, 0 for a tie; what it leaves open is counted
    and absent."""
    found = {}
    for pair, (first, second, ties) in _tally(item, group).items():
        if how.disagreement == "unanimous" and max(first, second, ties) < first + second + ties:
            counts["pairs on which people differ left out (--disagreement unanimous)"] += 1
        elif how.ties == "keep" and ties and ties >= max(first, second):
            found[pair] = 0
        elif first != second:  # half a vote for each side changes nothing here
            found[pair] = 1 if first > second else -1
        elif first:
            counts["pairs with as many votes for either side left out"] += 1
        else:
            counts["pairs that are ties left out (--ties)"] += 1
    return found


def _pairs(
    item: Item, group: Sequence[Judgement], how: How, counts: Counter[str]
) -> Iterator[tuple[Row, tuple[int, ...]]]:
    for (i, k), sign in _verdicts(item, group, how, counts).items():
        numbers = (i, k) if sign >= 0 else (k, i)
        yield _row(item, numbers) | {"tiers": [[0, 1]] if sign == 0 else [[0], [1]]}, numbers


def _rankings(
    item: Item, group: Sequence[Judgement], how: How, counts: Counter[str]
) -> Iterator[tuple[Row, tuple[int, ...]]]:
    verdicts = _verdicts(item, group, how, counts)
    numbers = tuple(range(item.count))
    if tiers := order_of(verdicts, item.count):
        yield _row(item, numbers) | {"tiers": [list(tier) for tier in tiers]}, numbers
        return
    pairs = [[i, k] if sign > 0 else [k, i] for (i, k), sign in verdicts.items() if sign]
    if not pairs:
        counts["items that decide no pair left out"] += 1
        return
    counts["rows whose votes form no order of all responses, written as pairs"] += 1
    yield _row(item, numbers) | {"votes": [[best, worse, 1.0] for best, worse in pairs]}, numbers


def _soft(
    item: Item, group: Sequence[Judgement], how: How, counts: Counter[str]
) -> Iterator[tuple[Row, tuple[int, ...]]]:
    votes: list[list[float]] = []
    signs: dict[Pair, int] = {}
    for (i, k), (first, second, ties) in _tally(item, group).items():
        half = ties / 2 if how.ties != "drop" else 0
        total = first + second + 2 * half
        if total:
            votes += [[i, k, (first + half) / total]] if first + half else []
            votes += [[k, i, (second + half) / total]] if second + half else []
            signs[i, k] = (first > second) - (first < second)
        else:
            counts["pairs that are ties left out (--ties)"] += 1
    if not votes:
        counts["items that decide no pair left out"] += 1
        return
    numbers = tuple(range(item.count))
    row = _row(item, numbers)
    # Beside the shares the order that most people see, where there is one, for what learns from orders.
    if tiers := order_of(signs, item.count):
        row["tiers"] = [list(tier) for tier in tiers]
    yield row | {"votes": votes}, numbers


def order_of(signs: dict[Pair, int], count: int) -> Tiers:
    """The order with ties of all responses that signs of pairs agree with, or nothing where there is none.

    >>> order_of({(0, 1): -1, (0, 2): 0, (1, 2): 1}, 3), order_of({(0, 1): 1, (1, 2): 1, (0, 2): -1}, 3)
    (((1,), (0, 2)), ())
    """
    if len(signs) < count * (count - 1) // 2:
        return ()
    net = [0] * count
    for (i, k), sign in signs.items():
        net[i] += sign
        net[k] -= sign
    if any(sign != (net[i] > net[k]) - (net[i] < net[k]) for (i, k), sign in signs.items()):
        return ()
    return tuple(tuple(k for k in range(count) if net[k] == n) for n in sorted(set(net), reverse=True))


def _row(item: Item, numbers: Iterable[int]) -> Row:
    """Prompt and responses; what else the row of the item says of its prompt, such as tools, stays."""
    return dict(item.row) | {"responses": [item.row["responses"][k] for k in numbers]}


def _provenance(
    item: Item, numbers: tuple[int, ...], group: Sequence[Judgement], people: dict[int, Annotator], study: str
) -> Row:
    """Who said what of which responses: ``numbers`` are those of the item that the row has, in its order."""
    said = []
    for j in group:
        told = j.vote.to_json() | {
            "annotator": people[j.annotator].pseudonym,
            "shown": list(j.shown),
            "seconds": j.seconds,
            "at": j.at,
        }
        said.append(told if j.active is None else told | {"active_seconds": j.active})
    origins = [item.origins[k] for k in numbers]
    return {
        "study": study,
        "item": item.id,
        "numbers": list(numbers),
        "models": [o.model for o in origins],
        "sampling": [None if o.sampling is None else dict(o.sampling) for o in origins],
        "source": item.file,
        "source_row": item.file_row,
        "annotations": said,
    }


AS_IT_IS = How(form="soft", ties="half", all_bad="drop", provenance=False)
"""Every vote counts: each pair is weighed by its share of votes, beside the order that most people see."""


@dataclass(frozen=True, slots=True)
class StudyRows:
    """The rows of a study; the file may be served meanwhile."""

    path: Path

    def rows(self, name: str, keep_going: bool) -> Iterator[object]:
        """Rows in the canonical layout: prompt, responses, votes, tiers where there is an order, and the models."""
        return iter(self._read().rows)

    def digest(self) -> str:
        """SHA-256 of the rows: the file's own bytes change with every page that is opened."""
        digest = hashlib.sha256()
        for row in self._read().rows:
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """What became of the votes, in words."""
        said = "; ".join(line for line in self._read().lines() if not line.endswith(" rows"))
        return [f"{self.path}: {said}"] if said else []

    def _read(self) -> Exported:
        try:
            with Study(self.path, read_only=True) as study:
                query = "SELECT (SELECT coalesce(max(id), 0) FROM event), (SELECT count(*) FROM item)"
                with study.reading() as connection:
                    state = tuple(connection.execute(query).fetchone())
            return _exported(self.path, study.settings.id, state)
        except StudyError as error:
            raise DataError(str(error).removeprefix(f"{self.path}: "), file=str(self.path)) from None


@lru_cache(maxsize=2)  # a run asks for notes, digest and rows one after another
def _exported(path: Path, study: str, state: tuple[int, int]) -> Exported:
    with Study(path, read_only=True) as opened:
        return export_rows(opened, AS_IT_IS)
