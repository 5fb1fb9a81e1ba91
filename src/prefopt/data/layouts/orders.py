"""Orders of K responses: given as tiers or indices, or told from labels of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from prefopt.data.layouts.row import Row
from prefopt.data.layouts.values import BadRow, index_of, items_of

Tiers = tuple[tuple[int, ...], ...]
Votes = tuple[tuple[int, int, float], ...]


def read_tiers(row: Row, name: str, count: int) -> Tiers:
    """Lists of indices from 0, best first; every response in one of them. No list at all is no preference."""
    tiers = tuple(
        tuple(index_of(k, count, name) for k in items_of(tier, f"an item of {name}")) for tier in row.items(name)
    )
    if not all(tiers):
        raise BadRow("wrong order", f"{name} holds an empty tier")
    if tiers:
        _once([k for tier in tiers for k in tier], name, count, count)
    return tiers


def read_order(row: Row, name: str, count: int) -> Tiers:
    """Indices from 0, best first, each once. With a column ``top_k``, the best few alone: the others share a tier."""
    order = [index_of(k, count, name) for k in row.items(name)]
    wanted = count
    if row.has("top_k"):
        said = row.number_of(row.given("top_k"), "top_k")
        if said != len(order) or not order:
            raise BadRow("wrong order", f"{name} names {len(order)} responses, and top_k says {said:g}")
        wanted = len(order)
    _once(order, name, wanted, count)
    rest = tuple(sorted(set(range(count)) - set(order)))
    return tuple((k,) for k in order) + ((rest,) if rest else ())


def write_order(tiers: Tiers, count: int) -> dict[str, object] | None:
    """The columns ``order`` and, for the best few alone, ``top_k``; None where there are other ties."""
    if not tiers or any(len(tier) > 1 for tier in tiers[:-1]):
        return None
    order = [tier[0] for tier in tiers[:-1]]
    if len(tiers[-1]) == 1:
        return {"order": [*order, tiers[-1][0]]}
    in_order = tiers[-1] == tuple(sorted(tiers[-1]))
    return {"order": order, "top_k": len(order)} if order and in_order else None


def read_votes(row: Row, name: str, count: int) -> Votes:
    """Lists of (preferred, dispreferred) or (preferred, dispreferred, weight), by indices from 0."""
    votes = []
    for item in row.items(name):
        vote = items_of(item, f"an item of {name}")
        if len(vote) not in (2, 3):
            raise BadRow("wrong type", f"an item of {name} holds {len(vote)} values, not winner, loser and weight")
        best, worse = index_of(vote[0], count, name), index_of(vote[1], count, name)
        weight = row.number_of(vote[2], f"the weight of an item of {name}") if len(vote) == 3 else 1.0
        if best == worse:
            raise BadRow("wrong order", f"{name} prefers response {best} to itself")
        if weight <= 0:
            raise BadRow("wrong type", f"the weight of an item of {name} is {weight:g}; it should be above 0")
        votes.append((best, worse, weight))
    return tuple(votes)


def from_pair_labels(labels: Sequence[int], count: int) -> tuple[Tiers, Votes | None]:
    """Tiers from labels of all pairs in the order 12, 13, ..., 23, ...: 0 equal, 1 the first, 2 the second is better.

    Where the labels form no order (cycles, ties that are not transitive) there are no tiers, but the votes.

    >>> from_pair_labels([0, 1, 1], 3)  # the first two are tied and better than the third
    (((0, 1), (2,)), None)
    >>> from_pair_labels([1, 2, 1], 3)  # a cycle
    ((), ((0, 1, 1.0), (2, 0, 1.0), (1, 2, 1.0)))
    """
    pairs = list(zip(combinations(range(count), 2), labels, strict=True))
    votes = tuple((i, j, 1.0) if label == 1 else (j, i, 1.0) for (i, j), label in pairs if label)
    net = [sum((best == k) - (worse == k) for best, worse, _ in votes) for k in range(count)]
    if all(label == pair_label(net[i], net[j]) for (i, j), label in pairs):
        return tuple(tuple(k for k in range(count) if net[k] == n) for n in sorted(set(net), reverse=True)), None
    return (), votes


def pair_label(first: float, second: float) -> int:
    """0 where two are equal, 1 where the first is higher, 2 where the second is."""
    return 0 if first == second else 1 if first > second else 2


def _once(named: Sequence[int], name: str, wanted: int, count: int) -> None:
    times = Counter(named)
    if twice := [k for k in named if times[k] > 1]:
        raise BadRow("wrong order", f"{name} names response {twice[0]} twice")
    if len(named) != wanted:
        missing = ", ".join(str(k) for k in range(count) if k not in times)
        raise BadRow("wrong order", f"{name} leaves out response {missing}; for the best few alone, say top_k")
