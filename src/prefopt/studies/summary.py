"""A study in numbers: how far it is, who agrees with whom, what is disputed. Gold items count for accuracy alone."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from prefopt.studies.agreement import Estimate, Unit, alpha_interval, kappa, raw_agreement, share_of
from prefopt.studies.annotators import Annotator, annotators
from prefopt.studies.digests import check, check_complete
from prefopt.studies.items import Tiers
from prefopt.studies.study import Study
from prefopt.studies.votes import Judgement, agrees_with, golds, judgements

ALL_BAD = 9
"""The value of a pair of responses that are both bad, beside 1, 0 and -1."""
DISPUTED = 12

UnitKey = tuple[int, int, int]
"""Item and two of its responses."""


@dataclass(frozen=True, slots=True)
class PersonSummary:
    """One annotator.

    ``agreement`` is the share of others' votes on the same pairs that say the same, ``kappa`` Cohen's kappa against
    what most of the others say, where most of them say one thing; ``first`` the share of preferences for what was
    shown first; ``gold`` the share of gold items judged as known, of ``golds``; ``seconds`` the median time on an item.
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
class Couple:
    """Two annotators on the pairs that both judged."""

    first: str
    second: str
    units: int
    raw: float
    kappa: float


@dataclass(frozen=True, slots=True)
class Disputed:
    """An item on which votes differ: ``disagreement`` is one less its raw agreement."""

    item: int
    votes: int
    disagreement: float


@dataclass(frozen=True, slots=True)
class ModelWins:
    """Pairs of a model's responses against other models', votes counted one by one."""

    name: str
    won: int
    tied: int
    lost: int
    share: Estimate


@dataclass(frozen=True, slots=True)
class Summary:
    """All of it. ``wanted`` is the number of votes that items and overlap ask for, ``votes`` those in force on them."""

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
    people: tuple[PersonSummary, ...]
    couples: tuple[Couple, ...]
    disputed: tuple[Disputed, ...]
    models: tuple[ModelWins, ...]


def summarise(study: Study, *, resamples: int = 1000) -> Summary:
    """Count everything, at one moment."""
    with study.reading() as connection:
        known = golds(connection)
        everyone = annotators(connection)
        found = list(judgements(connection))
        prompts, origins = {}, {}
        check_complete(connection, "item")
        for row in connection.execute("SELECT * FROM item WHERE gold IS NULL"):
            check("item", row)
            prompts[row["id"]], origins[row["id"]] = row["prompt_key"], row["origins"]
        undone = connection.execute("SELECT count(*) FROM event WHERE kind = 'undo'").fetchone()[0]
    said = [j for j in found if j.vote.skipped is None]
    free = [j for j in said if j.item not in known]
    nominal, ordinal = _units(free)
    couples = tuple(_couples(nominal, {p.id: p.name for p in everyone}))
    shared = sum(c.units for c in couples if not math.isnan(c.kappa))
    mean = sum(c.kappa * c.units for c in couples if not math.isnan(c.kappa)) / shared if shared else math.nan
    return Summary(
        title=study.settings.title,
        items=len(prompts),
        complete=sum(n >= study.settings.overlap for n in Counter(j.item for j in free).values()),
        wanted=len(prompts) * study.settings.overlap,
        votes=len(free),
        gold_items=len(known),
        gold_votes=len(said) - len(free),
        undone=undone,
        skips=dict(Counter(str(j.vote.skipped) for j in found if j.vote.skipped is not None)),
        answers=dict(Counter(answer(j) for j in free)),
        raw=raw_agreement(list(nominal.values())),
        kappa=mean,
        nominal=_alpha(nominal, prompts, resamples),
        ordinal=_alpha(ordinal, prompts, resamples, ordinal=True),
        first=first_shown(said),
        people=tuple(_people(everyone, found, nominal, known)),
        couples=couples,
        disputed=tuple(_disputed(nominal)),
        models=tuple(_models(free, origins)),
    )


def answer(j: Judgement) -> str:
    """The kind of a judgement: what of two was said, or that it is a ranking."""
    vote = j.vote
    if not vote.tiers:
        return "all bad"
    if len(vote.tiers) == 1:
        return "tie"
    return {1: "slightly better", 2: "better", 3: "much better"}[vote.strength] if vote.strength else "ranking"


def first_shown(found: Iterable[Judgement]) -> Estimate:
    """The share of preferences for the response that was shown before the other; one half without a bias.

    Of a ranking, its share of all pairs counts as one vote.
    """
    shares = []
    for j in found:
        place = {k: n for n, k in enumerate(j.shown)}
        ahead = [(place[i] < place[k]) == (sign > 0) for i, k, sign in j.vote.pairs if sign]
        if ahead:
            shares.append(sum(ahead) / len(ahead))
    return share_of(sum(shares) / len(shares), len(shares)) if shares else share_of(math.nan, 0)


def _units(found: Sequence[Judgement]) -> tuple[dict[UnitKey, dict[int, int]], dict[UnitKey, dict[int, int]]]:
    """Pairs of responses with what each person says of them: as names, and as numbers from -3 to 3."""
    nominal: dict[UnitKey, dict[int, int]] = defaultdict(dict)
    ordinal: dict[UnitKey, dict[int, int]] = defaultdict(dict)
    for j in found:
        if not j.vote.tiers:
            for i, k in combinations(range(len(j.shown)), 2):
                nominal[j.item, i, k][j.annotator] = ALL_BAD
        for i, k, sign in j.vote.pairs:
            nominal[j.item, i, k][j.annotator] = sign
            ordinal[j.item, i, k][j.annotator] = sign * (j.vote.strength or 2)
    return nominal, ordinal


def _alpha(
    units: dict[UnitKey, dict[int, int]], prompts: dict[int, bytes], resamples: int, *, ordinal: bool = False
) -> Estimate:
    return alpha_interval(
        list(units.values()),
        "ordinal" if ordinal else "nominal",
        clusters=[prompts[item] for item, _, _ in units],
        resamples=resamples,
    )


def _couples(units: dict[UnitKey, dict[int, int]], names: dict[int, str]) -> Iterable[Couple]:
    shared: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for unit in units.values():
        for a, b in combinations(sorted(unit), 2):
            shared[a, b].append((unit[a], unit[b]))
    for (a, b), pairs in sorted(shared.items()):
        raw = sum(x == y for x, y in pairs) / len(pairs)
        yield Couple(names[a], names[b], len(pairs), raw, kappa(pairs))


def _people(
    everyone: Sequence[Annotator],
    found: Sequence[Judgement],
    units: dict[UnitKey, dict[int, int]],
    known: dict[int, Tiers],
) -> Iterable[PersonSummary]:
    own: dict[int, list[Judgement]] = defaultdict(list)
    for j in found:
        own[j.annotator].append(j)
    equal, compared = Counter[int](), Counter[int]()
    against: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for unit in units.values():
        tally = Counter(unit.values())
        for person, value in unit.items() if len(unit) > 1 else ():
            equal[person] += tally[value] - 1
            compared[person] += len(unit) - 1
            rest = tally.copy()
            rest[value] -= 1
            (most, times), *others = rest.most_common()
            if not others or others[0][1] < times:
                against[person].append((value, most))
    for p in everyone:
        votes = [j for j in own[p.id] if j.vote.skipped is None]
        tried = [agrees_with(j.vote, known[j.item]) for j in votes if j.item in known]
        durations = [j.seconds if j.active is None else j.active for j in votes]
        yield PersonSummary(
            name=p.name,
            pseudonym=p.pseudonym,
            votes=len(votes),
            skips=len(own[p.id]) - len(votes),
            seconds=statistics.median(durations) if durations else math.nan,
            agreement=equal[p.id] / compared[p.id] if compared[p.id] else math.nan,
            kappa=kappa(against[p.id]),
            first=first_shown(votes),
            gold=share_of(sum(tried) / len(tried) if tried else math.nan, len(tried)),
            golds=len(tried),
        )


def _disputed(units: dict[UnitKey, dict[int, int]]) -> Iterable[Disputed]:
    by_item: dict[int, list[Unit]] = defaultdict(list)
    for (item, _, _), unit in units.items():
        by_item[item].append(unit)
    found = [
        Disputed(item, max(map(len, many)), 1 - raw_agreement(many))
        for item, many in by_item.items()
        if any(len(unit) > 1 for unit in many)
    ]
    found = [d for d in found if d.disagreement > 0]
    return sorted(found, key=lambda d: (-d.disagreement, -d.votes, d.item))[:DISPUTED]


def _models(found: Sequence[Judgement], origins: dict[int, str]) -> Iterable[ModelWins]:
    names: dict[int, list[str | None]] = {}
    tally: dict[str, Counter[int]] = defaultdict(Counter)
    for j in found:
        if j.item not in names:
            names[j.item] = [origin["model"] for origin in json.loads(origins[j.item])]
        for i, k, sign in j.vote.pairs:
            a, b = names[j.item][i], names[j.item][k]
            if a is not None and b is not None and a != b:
                tally[a][sign] += 1
                tally[b][-sign] += 1
    for name, counts in sorted(tally.items()):
        total = counts.total()
        yield ModelWins(name, counts[1], counts[0], counts[-1], share_of((counts[1] + counts[0] / 2) / total, total))
