"""What a loss is computed on: pairs, labelled responses or rankings, as arrays over the responses of some groups.

The responses of G groups laid end to end are numbered 0 to N - 1; every index here is one of those numbers.

>>> import numpy as np
>>> from prefopt.data.group import Group
>>> rows = [([1, 2, n], [False, False, True]) for n in (3, 4, 5)]
>>> group = Group.from_sequences(rows, row=1, pairs=((0, 1), (0, 2), (1, 2)))
>>> found = pairs_of([group, group], "all")
>>> found.chosen.tolist(), found.rejected.tolist(), found.weight.round(3).tolist()
([0, 0, 1, 3, 3, 4], [1, 2, 2, 4, 5, 5], [0.333, 0.333, 0.333, 0.333, 0.333, 0.333])

They are fixed by the order of the data: a row's prompt with as many responses as it has itself, taken from the rows
behind it whose prompt is another one (from the first row again after the last). So they are the same whatever the seed,
and their reference values are kept like all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.table import GroupTable, Part, TableBuilder
from prefopt.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Weighted = tuple[int, int, float]  # preferred, dispreferred, weight
WHICH = ("all", "best-worst")
"""``all``: every pair that the data give. ``best-worst``: the best response (or tied best) against the worst."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """P pairs: ``chosen`` and ``rejected`` responses, ``weight`` (1 in sum for each group), ``label``: the probability
    that the chosen one is better, 1 but where people's votes went both ways and were put together."""

    chosen: Ints
    rejected: Ints
    weight: Floats
    label: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labelled responses: ``response``, ``label`` (desirable or not) and ``weight``."""

    response: Ints
    label: npt.NDArray[np.bool_]
    weight: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Rankings:
    """Responses with ``tier`` (0 the best, equal where tied) and ``group`` (0 to G - 1), those of a group together."""

    response: Ints
    tier: Ints
    group: Ints

    @property
    def last(self) -> npt.NDArray[np.bool_]:
        """Whether a response stands in the last tier of its group."""
        last = np.zeros(int(self.group.max(initial=-1)) + 1, np.int64)
        np.maximum.at(last, self.group, self.tier)
        found: npt.NDArray[np.bool_] = self.tier == last[self.group]
        return found


def starts_of(groups: Sequence[Group]) -> Ints:
    """Number of the first response of each group, and N behind them, [G + 1]."""
    return np.cumsum([0, *(len(g.continuations) for g in groups)], dtype=np.int64)


def lengths_of(groups: Sequence[Group]) -> Ints:
    """Trained tokens of each response, [N]."""
    return np.array([int(c.trained.sum()) for g in groups for c in g.continuations], np.int64)


def scores_of(groups: Sequence[Group]) -> Floats:
    """The data's score of each response, [N]; NaN where it has none."""
    none = float("nan")
    return np.array([s for g in groups for s in (g.scores or [none] * len(g.continuations))], np.float64)


def pairs_of(groups: Sequence[Group], which: str, *, merge: bool = False) -> Pairs:
    """The pairs of ``groups``; see :data:`WHICH`. The pairs of a group weigh 1 together, whatever its K (InstructGPT:
    otherwise a prompt with many responses is overfitted).

    ``merge``: votes for both sides of a pair become one pair with a label between 0 and 1.
    Raises :class:`DataError` for a group that has no pair.
    """
    rows: list[tuple[int, int, float, float]] = []
    for group, start in zip(groups, starts_of(groups).tolist(), strict=False):
        found = _weighted(group) if which == "all" else _best_against_worst(group)
        total = sum(w for _, _, w in found)
        labelled = _merged(found) if merge else [(a, b, w, 1.0) for a, b, w in found]
        rows += [(start + a, start + b, w / total, p) for a, b, w, p in labelled]
    columns: Any = np.array(rows, np.float64).reshape(-1, 4).T
    return Pairs(columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2], columns[3])


def paired_of(groups: Sequence[Group], which: str) -> npt.NDArray[np.bool_]:
    """Which responses [N] :func:`pairs_of` reads: those of its pairs, and where votes alone give an order, all."""
    starts = starts_of(groups)
    read = np.zeros(int(starts[-1]), np.bool_)
    for group, start in zip(groups, starts.tolist(), strict=False):
        found = _weighted(group) if which == "all" else _best_against_worst(group)
        everyone = range(len(group.continuations))
        read[[start + k for k in ({k for pair in found for k in pair[:2]} if group.tiers else everyone)]] = True
    return read


def labels_of(groups: Sequence[Group]) -> Labels:
    """Every response with its label. Raises :class:`DataError` for a group without labels."""
    for group in groups:
        if group.labels is None:
            raise DataError("its responses have no labels; take a loss on pairs", row=group.row)
    label = np.array([label for g in groups for label in g.labels or ()], np.bool_)
    return Labels(np.arange(len(label), dtype=np.int64), label, np.ones(len(label)))


def rankings_of(groups: Sequence[Group]) -> Rankings:
    """Every response with its tier. Raises :class:`DataError` for a group whose data give no order."""
    response, tiers, owner = [], [], []
    for g, (group, start) in enumerate(zip(groups, starts_of(groups).tolist(), strict=False)):
        for tier, members in enumerate(_tiers(group)):
            response += [start + k for k in members]
            tiers += [tier] * len(members)
            owner += [g] * len(members)
    return Rankings(np.array(response, np.int64), np.array(tiers, np.int64), np.array(owner, np.int64))


def weights_of(group: Group, kind: str, which: str) -> list[float]:
    """The weights of a group's pairs, labels or ranking. Raises :class:`DataError` where it has none."""
    if kind == "ranking":
        _tiers(group)
        return [1.0]
    if kind == "labels" and group.labels is not None:
        return [1.0]
    found = _weighted(group) if which == "all" else _best_against_worst(group)
    total = sum(w for _, _, w in found)
    return sorted({round(w / total, 9) for _, _, w in found})


def _weighted(group: Group) -> list[Weighted]:
    """All pairs of a group with their weights."""
    weights = group.weights or [1.0] * len(group.pairs)
    found = [(a, b, float(w)) for (a, b), w in zip(group.pairs, weights, strict=True) if w > 0]
    if not found:
        raise DataError("no response is preferred to another", row=group.row)
    return found


def _best_against_worst(group: Group) -> list[Weighted]:
    tiers = group.tiers or _tiers_by_wins(group)
    if len(tiers) < 2:
        raise DataError("no response is preferred to all others; leave --pairs out", row=group.row)
    return [(best, worst, 1.0) for best in tiers[0] for worst in tiers[-1]]


def _tiers(group: Group) -> Sequence[Sequence[int]]:
    if group.tiers:
        tiers: Sequence[Sequence[int]] = group.tiers
    else:  # one pair is an order; votes are none
        tiers = [list(p) for p in zip(*group.pairs, strict=True)] if len(group.pairs) == 1 else []
    if len(tiers) < 2 or sum(map(len, tiers)) != len(group.continuations):
        raise DataError("its responses have no order; take a loss on pairs, or leave the row out", row=group.row)
    return tiers


def _tiers_by_wins(group: Group) -> list[list[int]]:
    """An order where only votes are: by the weight of what was won less that of what was lost."""
    net = [0.0] * len(group.continuations)
    for best, worst, weight in _weighted(group):
        net[best] += weight
        net[worst] -= weight
    return [[k for k, x in enumerate(net) if x == value] for value in sorted(set(net), reverse=True)]


def _merged(pairs: Sequence[Weighted]) -> Iterator[tuple[int, int, float, float]]:
    """Pairs with the part of their votes that went this way; of two sides the one with more comes first."""
    votes: dict[tuple[int, int], float] = {}
    for best, worst, weight in pairs:
        votes[best, worst] = votes.get((best, worst), 0.0) + weight
    for (best, worst), weight in votes.items():
        against = votes.get((worst, best), 0.0)
        if weight > against or (weight == against and best < worst):
            yield best, worst, weight + against, weight / (weight + against)


def mismatched(groups: Sequence[Group], max_length: int) -> tuple[GroupTable, int]:
    """For each of ``groups`` its prompt with other rows' responses, and how many of those lost their end: a sequence
    is cut at ``max_length`` tokens.

    Raises :class:`DataError` where all rows have the same prompt.
    """
    columns, cut = TableBuilder(), 0
    for index, group in enumerate(groups):
        prompt, _, _ = _parted(group, 0)
        sequences = []
        for ids, trained in islice(_others(groups, index, prompt), len(group.continuations)):
            mask = np.concatenate([np.zeros(len(prompt), np.bool_), trained])
            sequences.append((np.concatenate([prompt, ids])[:max_length], mask[:max_length]))
            cut += len(mask) > max_length
        try:
            columns.add(Group.from_sequences(sequences, group.row))
        except ValueError as error:
            raise DataError(f"with another row's response to its prompt, {error}", row=group.row) from None
    return GroupTable([Part(columns.columns())]), cut


def _others(groups: Sequence[Group], index: int, prompt: IntArray) -> Iterator[tuple[IntArray, BoolArray]]:
    """Responses of the rows behind ``index`` whose prompt is not ``prompt``, round and round."""
    found = False
    while True:
        for step in range(1, len(groups)):
            other = groups[(index + step) % len(groups)]
            if np.array_equal(_parted(other, 0)[0], prompt):
                continue
            found = True
            for k in range(len(other.continuations)):
                _, ids, trained = _parted(other, k)
                yield ids, trained
        if not found:
            raise DataError("every row has the same prompt, and the loss compares with responses to other prompts")


def _parted(group: Group, k: int) -> tuple[IntArray, IntArray, BoolArray]:
    """Response k in two: the ids before its first trained token, and ids and mask from there on."""
    ids, trained = group.sequence(k)
    first = int(np.argmax(trained))
    return ids[:first], ids[first:], trained[first:]
