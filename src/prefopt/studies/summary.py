"""Statistics of a study: progress, agreement, disputed items. Gold items count for the accuracy of annotators alone."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from prefopt.records import Tiers
from prefopt.studies.agreement import Estimate, Metric, alpha_interval, kappa, raw_agreement, share_of
from prefopt.studies.annotators import Annotator, annotators
from prefopt.studies.database import check_complete, check_row
from prefopt.studies.items import gold_tiers
from prefopt.studies.study import Study
from prefopt.studies.votes import StoredVote, stored_votes

ALL_BAD = 9
"""The value of a pair of responses that are both bad, beside 1, 0 and -1."""
MOST_DISPUTED = 12

Units = dict[tuple[int, int, int], dict[int, int]]
"""For each item and two of its responses: annotator to value."""


@dataclass(frozen=True, slots=True)
class AnnotatorSummary:
    """Statistics of one annotator.

    - ``seconds``: median time per item.
    - ``agreement``: fraction of the others' votes on the same pairs that are the same.
    - ``kappa``: Cohen's kappa with the majority of the others, on pairs where they have one.
    - ``first``: fraction of preferences for the response shown first.
    - ``gold``: fraction of the ``golds`` gold items voted on as known.
    """

    name: str
    pseudonym: str
    votes: int
    skips: int
    seconds: float
    agreement: float
    kappa: float
    first: Estimate
    gold: Estimate
    golds: int


@dataclass(frozen=True, slots=True)
class AnnotatorPair:
    """Two annotators on the pairs of responses (``units``) that both voted on."""

    first: str
    second: str
    units: int
    raw: float
    kappa: float


@dataclass(frozen=True, slots=True)
class DisputedItem:
    """An item on which votes differ; ``disagreement`` is 1 - raw agreement."""

    item: int
    votes: int
    disagreement: float


@dataclass(frozen=True, slots=True)
class ModelWins:
    """Pairs of a model's responses with other models' responses, counted per vote."""

    name: str
    won: int
    tied: int
    lost: int
    share: Estimate


@dataclass(frozen=True, slots=True)
class StudySummary:
    """All statistics. ``wanted`` is items times annotators per item, ``votes`` those in force on these items."""

    title: str
    items: int
    complete: int
    wanted: int
    votes: int
    gold_items: int
    gold_votes: int
    undone: int
    skips: dict[str, int]
    answers: dict[str, int]
    raw: float
    kappa: float
    nominal: Estimate
    ordinal: Estimate
    first: Estimate
    annotators: tuple[AnnotatorSummary, ...]
    annotator_pairs: tuple[AnnotatorPair, ...]
    disputed: tuple[DisputedItem, ...]
    models: tuple[ModelWins, ...]


def summarise(study: Study, *, resamples: int = 1000) -> StudySummary:
    """Compute all statistics from one view of the study."""
    with study.reading() as connection:
        gold = gold_tiers(connection)
        everyone = annotators(connection)
        found = list(stored_votes(connection))
        prompts, origins = {}, {}
        check_complete(connection, "item")
        for row in connection.execute("SELECT * FROM item WHERE gold IS NULL"):
            check_row("item", row)
            prompts[row["id"]], origins[row["id"]] = row["prompt_key"], row["origins"]
        undone = connection.execute("SELECT count(*) FROM event WHERE kind = 'undo'").fetchone()[0]
    votes = [v for v in found if v.vote.skipped is None]
    counted = [v for v in votes if v.item not in gold]
    nominal, ordinal = _units(counted)
    pairs = tuple(_annotator_pairs(nominal, {a.id: a.name for a in everyone}))
    kappas = [(p.kappa, p.units) for p in pairs if not math.isnan(p.kappa)]
    units = sum(count for _, count in kappas)

    def interval(of: Units, metric: Metric) -> Estimate:
        clusters = [prompts[item] for item, _, _ in of]
        return alpha_interval(list(of.values()), metric, clusters=clusters, resamples=resamples)

    return StudySummary(
        title=study.settings.title,
        items=len(prompts),
        complete=sum(n >= study.settings.overlap for n in Counter(v.item for v in counted).values()),
        wanted=len(prompts) * study.settings.overlap,
        votes=len(counted),
        gold_items=len(gold),
        gold_votes=len(votes) - len(counted),
        undone=undone,
        skips=dict(Counter(str(v.vote.skipped) for v in found if v.vote.skipped is not None)),
        answers=dict(Counter(answer_kind(v) for v in counted)),
        raw=raw_agreement(list(nominal.values())),
        kappa=sum(value * count for value, count in kappas) / units if units else math.nan,
        nominal=interval(nominal, "nominal"),
        ordinal=interval(ordinal, "ordinal"),
        first=first_shown(votes),
        annotators=tuple(_annotators(everyone, found, nominal, gold)),
        annotator_pairs=pairs,
        disputed=tuple(_disputed(nominal)),
        models=tuple(_models(counted, origins)),
    )


def answer_kind(v: StoredVote) -> str:
    """Which of the answers on the page a vote is, or ``ranking``."""
    vote = v.vote
    if vote.strength:
        return {1: "slightly better", 2: "better", 3: "much better"}[vote.strength]
    return {0: "all bad", 1: "tie"}.get(len(vote.tiers), "ranking")


def first_shown(votes: Iterable[StoredVote]) -> Estimate:
    """The fraction of preferences for the response shown before the other; 0.5 without a position bias.

    A ranking counts as one vote, by the fraction of its pairs.
    """
    fractions = []
    for v in votes:
        position = {k: n for n, k in enumerate(v.shown)}
        ahead = [(position[i] < position[k]) == (sign > 0) for i, k, sign in v.vote.pairs if sign]
        if ahead:
            fractions.append(sum(ahead) / len(ahead))
    return share_of(sum(fractions) / len(fractions) if fractions else math.nan, len(fractions))


def _units(votes: Sequence[StoredVote]) -> tuple[Units, Units]:
    """Pairs of responses with each annotator's value: nominal (1, 0, -1, both bad), and ordinal from -3 to 3."""
    nominal: Units = defaultdict(dict)
    ordinal: Units = defaultdict(dict)
    for v in votes:
        if not v.vote.tiers:
            for i, k in combinations(range(len(v.shown)), 2):
                nominal[v.item, i, k][v.annotator] = ALL_BAD
        for i, k, sign in v.vote.pairs:
            nominal[v.item, i, k][v.annotator] = sign
            ordinal[v.item, i, k][v.annotator] = sign * (v.vote.strength or 2)
    return nominal, ordinal


def _annotator_pairs(units: Units, names: Mapping[int, str]) -> Iterator[AnnotatorPair]:
    shared: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for unit in units.values():
        for a, b in combinations(sorted(unit), 2):
            shared[a, b].append((unit[a], unit[b]))
    for (a, b), values in sorted(shared.items()):
        raw = sum(x == y for x, y in values) / len(values)
        yield AnnotatorPair(names[a], names[b], len(values), raw, kappa(values))


def _annotators(
    everyone: Sequence[Annotator], found: Sequence[StoredVote], units: Units, gold: Mapping[int, Tiers]
) -> Iterator[AnnotatorSummary]:
    own: dict[int, list[StoredVote]] = defaultdict(list)
    for v in found:
        own[v.annotator].append(v)
    equal, compared = Counter[int](), Counter[int]()
    with_majority: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for unit in units.values():
        counts = Counter(unit.values())
        for annotator, value in unit.items() if len(unit) > 1 else ():
            equal[annotator] += counts[value] - 1
            compared[annotator] += len(unit) - 1
            rest = counts.copy()
            rest[value] -= 1
            (majority, times), *others = rest.most_common()
            if not others or others[0][1] < times:
                with_majority[annotator].append((value, majority))
    for a in everyone:
        votes = [v for v in own[a.id] if v.vote.skipped is None]
        right = [v.vote.matches(gold[v.item]) for v in votes if v.item in gold]
        durations = [v.seconds if v.active is None else v.active for v in votes]
        yield AnnotatorSummary(
            name=a.name,
            pseudonym=a.pseudonym,
            votes=len(votes),
            skips=len(own[a.id]) - len(votes),
            seconds=statistics.median(durations) if durations else math.nan,
            agreement=equal[a.id] / compared[a.id] if compared[a.id] else math.nan,
            kappa=kappa(with_majority[a.id]),
            first=first_shown(votes),
            gold=share_of(sum(right) / len(right) if right else math.nan, len(right)),
            golds=len(right),
        )


def _disputed(units: Units) -> list[DisputedItem]:
    by_item: dict[int, list[Mapping[int, int]]] = defaultdict(list)
    for (item, _, _), unit in units.items():
        by_item[item].append(unit)
    # Without two votes on a pair the agreement is nan, and so is left out.
    items = [DisputedItem(item, max(map(len, many)), 1 - raw_agreement(many)) for item, many in by_item.items()]
    disputed = [d for d in items if d.disagreement > 0]
    return sorted(disputed, key=lambda d: (-d.disagreement, -d.votes, d.item))[:MOST_DISPUTED]


def _models(votes: Sequence[StoredVote], origins: Mapping[int, str]) -> Iterator[ModelWins]:
    names = {item: [origin["model"] for origin in json.loads(origins[item])] for item in {v.item for v in votes}}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for v in votes:
        for i, k, sign in v.vote.pairs:
            a, b = names[v.item][i], names[v.item][k]
            if a is not None and b is not None and a != b:
                counts[a][sign] += 1
                counts[b][-sign] += 1
    for name, by_sign in sorted(counts.items()):
        total = by_sign.total()
        share = share_of((by_sign[1] + by_sign[0] / 2) / total, total)
        yield ModelWins(name, by_sign[1], by_sign[0], by_sign[-1], share)
