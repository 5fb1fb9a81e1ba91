"""Columns of a batch that come from the data alone: pairs, labels or rankings, and scores.

>>> rows = [([1, 2, n], [False, False, True]) for n in (3, 4, 5)]
>>> group = Group.from_sequences(rows, row=1, pairs=((0, 1), (0, 2), (1, 2)))
>>> found = columns_of([group, group], "pairs")
>>> found["pairs_G"].tolist(), found["chosen_P"].tolist(), found["rejected_P"].tolist()
([3, 3], [0, 0, 1, 0, 0, 1], [1, 2, 2, 1, 2, 2])
>>> found["weight_P"].round(3).tolist()
[0.333, 0.333, 0.333, 0.333, 0.333, 0.333]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.table import GroupTable, Part, TableBuilder
from prefopt.errors import DataError
from prefopt.losses.declare import Kind
from prefopt.train.batch import Batch, Column

Weighted = tuple[int, int, float]  # preferred, dispreferred, weight
WHICH = ("all", "best-worst")
"""``all``: every pair that the data give. ``best-worst``: the best response (or tied best) against the worst."""


def preference_batch(groups: Sequence[Group], kind: Kind, which: str = "all", *, merge: bool = False) -> Batch:
    """``groups`` with the columns of :func:`columns_of`."""
    return Batch(groups, columns_of(groups, kind, which, merge=merge))


def columns_of(groups: Sequence[Group], kind: Kind, which: str = "all", *, merge: bool = False) -> dict[str, Column]:
    """``score_N`` (NaN: none) and, by ``kind``, what losses are computed on.

    ``pairs``: ``pairs_G`` how many a group has, ``chosen_P`` and ``rejected_P`` responses, ``weight_P`` (1 in sum for
    each group, whatever its K: InstructGPT, otherwise a prompt with many responses is overfitted) and ``label_P``, the
    probability that the chosen one is better. ``which``: see :data:`WHICH`. ``merge``: votes for both sides of a pair
    become one pair with a label between 0 and 1.

    ``labels``: ``label_N``, whether a response is desirable. ``ranking``: ``ranked_N`` the responses of each group,
    best first, and ``tier_N`` the tier of each of those (0 the best, equal where tied).

    Raises :class:`DataError` for a group that lacks them.
    """
    none = float("nan")
    scores = [s for g in groups for s in (g.scores or [none] * len(g.continuations))]
    found: dict[str, Column] = {"score_N": np.array(scores, np.float64)}
    if kind == "pairs":
        return found | _pair_columns(groups, which, merge=merge)
    if kind == "ranking":
        tiers = [(k, tier) for group in groups for tier, members in enumerate(_tiers(group)) for k in members]
        order: Any = np.array(tiers, np.int64).reshape(-1, 2).T
        return found | {"ranked_N": order[0], "tier_N": order[1]}
    for group in groups:
        if group.labels is None:
            raise DataError("its responses have no labels; take a loss on pairs", row=group.row)
    return found | {"label_N": np.array([label for g in groups for label in g.labels or ()], np.bool_)}


def _pair_columns(groups: Sequence[Group], which: str, *, merge: bool) -> dict[str, Column]:
    rows: list[tuple[int, int, float, float]] = []
    counts = []
    for group in groups:
        found = _weighted(group) if which == "all" else _best_against_worst(group)
        total = sum(w for _, _, w in found)
        labelled = list(_merged(found)) if merge else [(a, b, w, 1.0) for a, b, w in found]
        rows += [(a, b, w / total, p) for a, b, w, p in labelled]
        counts.append(len(labelled))
    columns: Any = np.array(rows, np.float64).reshape(-1, 4).T
    return {
        "pairs_G": np.array(counts, np.int64),
        "chosen_P": columns[0].astype(np.int64),
        "rejected_P": columns[1].astype(np.int64),
        "weight_P": columns[2],
        "label_P": columns[3],
    }


def paired_of(groups: Sequence[Group], which: str) -> npt.NDArray[np.bool_]:
    """Which responses [N] :func:`columns_of` reads: those of its pairs, and where votes alone give an order, all."""
    read = []
    for group in groups:
        found = _weighted(group) if which == "all" else _best_against_worst(group)
        everyone = range(len(group.continuations))
        some = {k for pair in found for k in pair[:2]} if group.tiers else everyone
        read += [k in some for k in everyone]
    return np.array(read, np.bool_)


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
