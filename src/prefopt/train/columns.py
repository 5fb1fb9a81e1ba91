"""Columns that come from the data alone (pairs, labels, rankings, scores), and the inputs of losses by name.

>>> rows = [([1, 2, n], [False, False, True]) for n in (3, 4, 5)]
>>> group = Group.from_sequences(rows, row=1, pairs=((0, 1), (0, 2), (1, 2)))
>>> found = columns_of([group, group], "pairs")
>>> found["pairs_G"].tolist(), found["chosen_P"].tolist(), found["rejected_P"].tolist()
([3, 3], [0, 0, 1, 0, 0, 1], [1, 2, 2, 1, 2, 2])
>>> found["weight_P"].round(3).tolist()
[0.333, 0.333, 0.333, 0.333, 0.333, 0.333]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prefopt.data.group import BoolArray, Group, IntArray
from prefopt.data.table import GroupTable, IndexArray, Part, TableBuilder, ranges
from prefopt.errors import DataError
from prefopt.losses.declare import Kind
from prefopt.records import Tiers, tiers_of
from prefopt.train.batch import Batch, Column, weighted_sum
from prefopt.transfer import on_device

Weighted = tuple[int, int, float]  # preferred, dispreferred, weight
WHICH = ("all", "best-worst")
"""``all``: every pair of the data. ``best-worst``: the best responses (more than one if tied) against the worst."""


def preference_batch(groups: Sequence[Group], kind: Kind, which: str = "all", *, merge: bool = False) -> Batch:
    """``groups`` with the columns of :func:`columns_of`."""
    return Batch(groups, columns_of(groups, kind, which, merge=merge))


def columns_of(groups: Sequence[Group], kind: Kind, which: str = "all", *, merge: bool = False) -> dict[str, Column]:
    """``score_N`` (NaN where absent) and the columns that losses of ``kind`` need.

    ``pairs``: ``pairs_G`` (pairs of each group), ``chosen_P`` and ``rejected_P`` (responses), ``weight_P`` (sums to 1
    over a group, whatever its K: InstructGPT, otherwise prompts with many responses are overfitted) and ``label_P``
    (probability that the chosen one is better). ``which``: see :data:`WHICH`. ``merge``: votes for both sides of a pair
    become one pair with a label between 0 and 1.

    ``labels``: ``label_N``, whether a response is desirable. ``ranking``: ``ranked_N``, the responses of each group,
    best first, and ``tier_N``, their tiers (0 is best, equal where tied).

    Raises :class:`DataError` for a group without them.
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
        found = _weighted(group, which)
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
    """Which responses [N] :func:`columns_of` reads: those in its pairs, or all where only votes give an order."""
    read = []
    for group in groups:
        found = _weighted(group, which)
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
    found = _weighted(group, which)
    total = sum(w for _, _, w in found)
    return sorted({round(w / total, 9) for _, _, w in found})


def _weighted(group: Group, which: str = "all") -> list[Weighted]:
    """The pairs of a group with their weights."""
    if which == "best-worst":
        tiers = group.tiers or _tiers_by_wins(group)
        if len(tiers) < 2:
            raise DataError("no response is preferred to all others; leave --pairs out", row=group.row)
        return [(best, worst, 1.0) for best in tiers[0] for worst in tiers[-1]]
    weights = group.weights or [1.0] * len(group.pairs)
    found = [(a, b, float(w)) for (a, b), w in zip(group.pairs, weights, strict=True) if w > 0]
    if not found:
        raise DataError("no response is preferred to another", row=group.row)
    return found


def _tiers(group: Group) -> Sequence[Sequence[int]]:
    if group.tiers:
        tiers: Sequence[Sequence[int]] = group.tiers
    else:  # a single pair is an order, votes are not
        tiers = [list(p) for p in zip(*group.pairs, strict=True)] if len(group.pairs) == 1 else []
    if len(tiers) < 2 or sum(map(len, tiers)) != len(group.continuations):
        raise DataError("its responses have no order; take a loss on pairs, or leave the row out", row=group.row)
    return tiers


def _tiers_by_wins(group: Group) -> Tiers:
    """An order from votes: by the weight of comparisons won minus those lost."""
    net = [0.0] * len(group.continuations)
    for best, worst, weight in _weighted(group):
        net[best] += weight
        net[worst] -= weight
    return tiers_of(net)


def _merged(pairs: Sequence[Weighted]) -> Iterator[tuple[int, int, float, float]]:
    """One pair for each two responses: (best, worst, weight, fraction of the weight for ``best``, at least half)."""
    votes: dict[tuple[int, int], float] = {}
    for best, worst, weight in pairs:
        votes[best, worst] = votes.get((best, worst), 0.0) + weight
    for (best, worst), weight in votes.items():
        against = votes.get((worst, best), 0.0)
        if weight > against or (weight == against and best < worst):
            yield best, worst, weight + against, weight / (weight + against)


def mismatched(groups: Sequence[Group], max_length: int) -> tuple[GroupTable, int]:
    """The prompt of each group with other rows' responses, and how many of these were truncated to ``max_length``.

    Raises :class:`DataError` where all rows have the same prompt.
    """
    columns, cut = TableBuilder(), 0
    for index, group in enumerate(groups):
        prompt, _, _ = _prompt_and_response(group, 0)
        if any(c.pictures for c in group.continuations):
            raise DataError("a loss on mismatched responses takes pictures in prompts alone", row=group.row)
        sequences = []
        for ids, trained in islice(_others(groups, index, prompt), len(group.continuations)):
            mask = np.concatenate([np.zeros(len(prompt), np.bool_), trained])
            sequences.append((np.concatenate([prompt, ids])[:max_length], mask[:max_length]))
            cut += len(mask) > max_length
        try:
            pictures = [group.pictures] * len(sequences) if group.pictures else ()
            columns.add(Group.from_sequences(sequences, group.row, pictures=pictures))
        except ValueError as error:
            raise DataError(f"with another row's response to its prompt, {error}", row=group.row) from None
    return GroupTable([Part(columns.columns())]), cut


def _others(groups: Sequence[Group], index: int, prompt: IntArray) -> Iterator[tuple[IntArray, BoolArray]]:
    """Responses to prompts other than ``prompt``, from the rows after ``index``, cyclically without end."""
    found = False
    while True:
        for step in range(1, len(groups)):
            other = groups[(index + step) % len(groups)]
            if np.array_equal(_prompt_and_response(other, 0)[0], prompt):
                continue
            found = True
            for k in range(len(other.continuations)):
                _, ids, trained = _prompt_and_response(other, k)
                yield ids, trained
        if not found:
            raise DataError("every row has the same prompt, and the loss compares with responses to other prompts")


def _prompt_and_response(group: Group, k: int) -> tuple[IntArray, IntArray, BoolArray]:
    """The ids of sequence k before its first trained token; the ids and mask from there on."""
    ids, trained = group.sequence(k)
    first = int(np.argmax(trained))
    return ids[:first], ids[first:], trained[first:]


Values = dict[str, torch.Tensor]
"""Tensors by name: per response (``logp_N``), token (``logp_M``) or pair (``chosen_head_logp_P``)."""


@dataclass
class LossInputs:
    """A batch as losses of ``kind`` see it. Rows R are pairs, labelled responses or rankings."""

    batch: Batch
    kind: Kind
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def length_N(self) -> torch.Tensor:
        """Trained tokens of each response."""
        return self.column("length_N", self.dtype)

    @cached_property
    def weight_R(self) -> torch.Tensor:
        """Weight of each pair; labelled responses and rankings weigh 1."""
        if self.kind == "pairs":
            return self.column("weight_P", self.dtype)
        rows = len(self.batch) if self.kind == "ranking" else len(self.batch.length_N)
        return torch.ones(rows, dtype=self.dtype, device=self.device)

    def column(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A column on the device, as :meth:`Batch.on_device` gives it."""
        return self.batch.on_device(self.device)[name].to(dtype)

    def named(self, names: Iterable[str], optional: Iterable[str], values: Values) -> Values:
        """The tensors that losses need, by name; zeros where ``values`` has none.

        ``label_P``, if optional, is left out where all labels are 1.
        """
        wanted = {*names, *optional}
        if "label_P" in optional and "label_P" not in names and not (self.batch.columns["label_P"] != 1).any():
            wanted.remove("label_P")
        return {name: self._named(name, values) for name in wanted}

    def _named(self, name: str, values: Values) -> torch.Tensor:
        columns = self.batch.columns
        if self.kind == "pairs":
            if name == "label_P":
                return self.column("label_P", self.dtype)
            if "_head_" in name:
                return values.get(name, torch.zeros_like(self.weight_R))
            side, _, word = name.removesuffix("_P").partition("_")
            return self._of_responses(f"{word}_N", values)[self.column(f"{side}_P")]
        if self.kind == "labels":
            return self.column("label_N") if name == "label_N" else self._of_responses(name, values)
        if name == "tier_N":  # on the CPU: losses read it number by number
            return torch.from_numpy(columns["tier_N"])
        if name == "group_N":
            return torch.from_numpy(self.batch.group_N)
        return self._of_responses(name, values)[self.column("ranked_N")]

    def _of_responses(self, name: str, values: Values) -> torch.Tensor:
        if name == "length_N":
            return self.length_N
        if name == "score_N":
            return self.column("score_N", self.dtype)
        return values.get(name, torch.zeros_like(self.length_N))

    @torch.no_grad()
    def response_metrics(self, values: Values) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Lengths and log-ratios per token of the preferred and the other responses, as (sum, weight)."""
        per_response = {"lengths": self.length_N}
        if "ref_logp_N" in values:
            per_response["log_ratios_per_token"] = (values["logp_N"] - values["ref_logp_N"]) / self.length_N
        sides = self._sides()
        return {
            f"{name}/{side}": weighted_sum(x if at is None else x[at], weight)
            for name, x in per_response.items()
            for side, (at, weight) in sides.items()
        }

    def _sides(self) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
        """Which responses count as ``chosen`` and as ``rejected`` (None: all), and their weights."""
        columns = self.batch.columns
        if self.kind == "pairs":
            sides = ("chosen", "rejected")
            return {side: (self.column(f"{side}_P"), self.weight_R) for side in sides}
        if self.kind == "labels":
            label = self.column("label_N", self.dtype)
            return {"chosen": (None, self.weight_R * label), "rejected": (None, self.weight_R * (1 - label))}
        tier, group = columns["tier_N"], self.batch.group_N
        last = np.zeros(len(self.batch), np.int64)
        np.maximum.at(last, group, tier)
        ranked = self.column("ranked_N")
        first, worst = (x.to(self.dtype) for x in on_device([tier == 0, tier == last[group]], self.device))
        return {"chosen": (ranked, first), "rejected": (ranked, worst)}


def head_sums(values_M: torch.Tensor, starts_R: Sequence[IndexArray], count_R: IndexArray) -> list[torch.Tensor]:
    """Sums [R] of ``count_R`` consecutive token values, once for each of ``starts_R``, the first ones' places."""
    owner = np.repeat(np.arange(len(count_R)), count_R)
    places = [ranges(starts, count_R, np.arange(len(count_R))) for starts in starts_R]
    owner_T, *places_T = on_device([owner, *places], values_M.device)
    return [values_M.new_zeros(len(count_R)).index_add(0, owner_T, values_M[at]) for at in places_T]
