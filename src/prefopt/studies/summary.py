"""Statistics of a study: progress, agreement of annotators, disputed items. Gold items count for the accuracy of
annotators alone.

Agreement is measured on units: ``units[u]`` maps each annotator who voted on unit u to the value of the vote.

>>> units = [{1: 0, 2: 0}, {1: 1, 2: 1}, {1: 0, 2: 1}, {1: 0, 2: 0}]
>>> raw_agreement(units), round(alpha_interval(units).value, 4), round(kappa([(0, 0), (1, 1), (0, 1), (0, 0)]), 4)
(0.75, 0.5333, 0.5)

Sources: J. Cohen, A coefficient of agreement for nominal scales, Educational and Psychological Measurement 20 (1960);
K. Krippendorff, Computing Krippendorff's alpha-reliability (2011), sections C and D for missing values and for the
ordinal metric.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from prefopt.core.statistics import wilson
from prefopt.records import Tiers
from prefopt.studies.annotators import Annotator, annotators
from prefopt.studies.database import EVERYONE, OWN_OVERLAP, check_complete, check_row
from prefopt.studies.items import gold_tiers
from prefopt.studies.quality import Flag, flags_of
from prefopt.studies.study import Study
from prefopt.studies.votes import STRENGTHS, StoredVote, stored_votes

ALL_BAD = 9
"""The value of a pair of responses that are both bad, beside 1, 0 and -1."""
MOST_DISPUTED = 12

FloatArray = npt.NDArray[np.float64]
Unit = Mapping[int, int]
Metric = Literal["nominal", "ordinal"]
Units = dict[tuple[int, int, int], dict[int, int]]
"""For each item and two of its responses: annotator to value."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; nan without data."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class AnnotatorSummary:
    """Statistics of one annotator.

    - ``seconds``: median time per item.
    - ``agreement``: fraction of the others' votes on the same pairs that are the same.
    - ``kappa``: Cohen's kappa with the majority of the others, on pairs where they have one.
    - ``first``: fraction of preferences for the response shown first.
    - ``gold``: fraction of the ``golds`` gold items voted on as known.
    - ``flags``: why the votes should be looked at, see :mod:`prefopt.studies.quality`.
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
    flags: tuple[Flag, ...] = ()


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
    """All statistics. ``wanted`` are the annotators per item summed over the items (all who have voted, for an item
    that everyone judges), ``votes`` those in force on these items."""

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
    with study.reading() as connection:
        gold, everyone, found = gold_tiers(connection), annotators(connection), list(stored_votes(connection))
        prompts, origins, wanted = {}, {}, dict[int, int]()
        check_complete(connection, "item")
        for row in connection.execute(f"SELECT i.*, {OWN_OVERLAP} AS own FROM item i WHERE gold IS NULL"):
            check_row("item", row)
            prompts[row["id"]], origins[row["id"]] = row["prompt_key"], row["origins"]
            wanted[row["id"]] = row["own"] or study.settings.overlap
        undone = connection.execute("SELECT count(*) FROM event WHERE kind = 'undo'").fetchone()[0]
    votes = [v for v in found if v.vote.skipped is None]
    counted = [v for v in votes if v.item not in gold]
    voters = len({v.annotator for v in votes})
    wanted = {item: max(1, voters) if n == EVERYONE else n for item, n in wanted.items()}
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
        complete=sum(n >= wanted[item] for item, n in Counter(v.item for v in counted).items()),
        wanted=sum(wanted.values()),
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
    """The answer on the page that a vote is, or ``ranking``."""
    vote = v.vote
    if vote.strength:
        return STRENGTHS[vote.strength]
    return {0: "all bad", 1: "tie"}.get(len(vote.tiers), "ranking")


def first_shown(votes: Iterable[StoredVote]) -> Estimate:
    """The fraction of preferences for the response shown before the other; 0.5 without a position bias. A ranking
    counts as one vote, by the fraction of its pairs."""
    fractions = _ahead(votes)
    return share_of(sum(fractions) / len(fractions) if fractions else math.nan, len(fractions))


def _ahead(votes: Iterable[StoredVote]) -> list[float]:
    """Of each vote that prefers something, the fraction of pairs of which the response shown first is preferred."""
    fractions = []
    for v in votes:
        position = {k: n for n, k in enumerate(v.shown)}
        ahead = [(position[i] < position[k]) == (sign > 0) for i, k, sign in v.vote.pairs if sign]
        if ahead:
            fractions.append(sum(ahead) / len(ahead))
    return fractions


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
    seconds_of = {a.id: _durations(own[a.id]) for a in everyone}
    medians = {id: statistics.median(seconds) for id, seconds in seconds_of.items() if seconds}
    for a in everyone:
        votes = [v for v in own[a.id] if v.vote.skipped is None]
        fractions = _ahead(votes)
        ahead, behind = sum(f > 0.5 for f in fractions), sum(f < 0.5 for f in fractions)
        elsewhere = [median for id, median in medians.items() if id != a.id]
        right = [v.vote.matches(gold[v.item]) for v in votes if v.item in gold]
        yield AnnotatorSummary(
            name=a.name,
            pseudonym=a.pseudonym,
            votes=len(votes),
            skips=len(own[a.id]) - len(votes),
            seconds=medians.get(a.id, math.nan),
            agreement=equal[a.id] / compared[a.id] if compared[a.id] else math.nan,
            kappa=kappa(with_majority[a.id]),
            first=first_shown(votes),
            gold=share_of(sum(right) / len(right) if right else math.nan, len(right)),
            golds=len(right),
            flags=flags_of(seconds_of[a.id], ahead, behind, elsewhere),
        )


def _durations(votes: Iterable[StoredVote]) -> list[float]:
    """Seconds of each vote, those in which the page was visible where the browser said so."""
    return [v.seconds if v.active is None else v.active for v in votes if v.vote.skipped is None]


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


# -- agreement -----------------------------------------------------------------------------------------------------


def raw_agreement(units: Sequence[Unit]) -> float:
    """The fraction of equal values among all pairs of two annotators on one unit; nan without such a pair."""
    pairs = equal = 0
    for unit in units:
        counts = Counter(unit.values())
        pairs += math.comb(len(unit), 2)
        equal += sum(math.comb(n, 2) for n in counts.values())
    return equal / pairs if pairs else math.nan


def kappa(pairs: Sequence[tuple[int, int]]) -> float:
    """Cohen's kappa of two annotators, (po - pe) / (1 - pe); nan without pairs, or where only one value occurs."""
    if not pairs:
        return math.nan
    total = len(pairs)
    observed = sum(a == b for a, b in pairs) / total
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(first[v] * second[v] for v in first) / total**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def alpha_interval(
    units: Sequence[Unit],
    metric: Metric = "nominal",
    *,
    clusters: Sequence[object] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Krippendorff's alpha, 1 - Do / De, with a percentile bootstrap interval over units, or over ``clusters`` (one key
    per unit); nan where no unit has two values, or all values are the same.

    Units of one cluster, such as the pairs of one ranking, are resampled together. Resamples without an alpha are left
    out.
    """
    counts, kept = _coincidences(units)
    if not len(counts):
        return Estimate(math.nan, math.nan, math.nan)
    value = float(_alphas(counts.sum(axis=0)[None], metric)[0])
    if clusters is not None:
        _, member = np.unique([repr(clusters[u]) for u in kept], return_inverse=True)
        summed = np.zeros((int(member.max()) + 1, *counts.shape[1:]))
        np.add.at(summed, member, counts)
        counts = summed
    # Equal clusters are counted and drawn by a multinomial: few are distinct, however many units there are.
    size = counts.shape[1]
    different, times = np.unique(counts.reshape(len(counts), -1), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(counts), times / len(counts), size=resamples)
    found = _alphas((drawn @ different).reshape(resamples, size, size), metric)
    found = found[~np.isnan(found)]
    low, high = np.quantile(found, (0.025, 0.975)) if len(found) else (math.nan, math.nan)
    return Estimate(value, float(low), float(high))


def _coincidences(units: Sequence[Unit]) -> tuple[FloatArray, list[int]]:
    """Coincidence matrices [U, C, C] of the units with two or more values, and the indices of these units."""
    values = sorted({value for unit in units for value in unit.values()})
    number = {value: k for k, value in enumerate(values)}
    kept = [u for u, unit in enumerate(units) if len(unit) > 1]
    found = np.zeros((len(kept), len(values), len(values)))
    for row, u in zip(found, kept, strict=True):
        counts = np.bincount([number[value] for value in units[u].values()], minlength=len(values)).astype(np.float64)
        row += (np.outer(counts, counts) - np.diag(counts)) / (len(units[u]) - 1)
    return found, kept


def _alphas(o: FloatArray, metric: Metric) -> FloatArray:
    """Alphas [B] of coincidence matrices [B, C, C]: 1 - (n - 1) sum(o d) / sum(n_c n_k d)."""
    totals = o.sum(axis=2)
    n = totals.sum(axis=1)
    if metric == "nominal":
        d = np.broadcast_to(1.0 - np.eye(o.shape[1]), o.shape)
    else:
        # The squared number of values between c and k, with half of each end: the distance in ranks.
        below = np.cumsum(totals, axis=1) - totals / 2
        d = (below[:, :, None] - below[:, None, :]) ** 2
    expected = (totals[:, :, None] * totals[:, None, :] * d).sum(axis=(1, 2))
    observed = (o * d).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - (n - 1) * observed / expected, math.nan)


def share_of(share: float, count: int) -> Estimate:
    """A fraction of ``count`` trials with its Wilson interval."""
    return Estimate(share, *wilson(share, count)) if count else Estimate(math.nan, math.nan, math.nan)
