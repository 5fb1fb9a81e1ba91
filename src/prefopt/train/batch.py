"""A batch: groups, and named columns of data about them.

The last letter of a column's name is its axis: ``_G`` groups, ``_N`` responses (those of all groups end to end), ``_M``
trained tokens (those of all responses end to end), ``_P`` pairs; of scored values also ``_B`` micro-batches. Positions
within a column, such as ``chosen_P``, count the responses of their own group, so that :meth:`Batch.select` cuts each
column by itself.

>>> rows = [([1, 2, n], [False, False, True]) for n in (3, 4)]
>>> group = Group.from_sequences(rows, row=1)
>>> batch = Batch([group, group], {"pairs_G": np.array([1, 1]), "chosen_P": np.array([0, 1]), "label_N": np.arange(4)})
>>> batch.at_N("chosen_P").tolist(), batch.select([1]).columns["label_N"].tolist()
([0, 3], [2, 3])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from prefopt.data.group import Group
from prefopt.data.table import IndexArray, Selection, ranges
from prefopt.model.packing import PackedBatch, pack, split
from prefopt.model.scorer import PackedModel
from prefopt.runs.metrics import Record
from prefopt.transfer import on_device

Column = npt.NDArray[Any]
POSITIONS = ("chosen_P", "rejected_P", "ranked_N")
"""Columns of positions within a group."""
AT_ONCE = 512  # groups held as objects; held-out rows may be many more


@dataclass(frozen=True, eq=False)
class Batch:
    """G groups with ``columns`` by name. ``mismatched``: the same prompts with responses to other prompts (KTO)."""

    groups: Sequence[Group]
    columns: Mapping[str, Column] = field(default_factory=dict)
    mismatched: Batch | None = None

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def responses_G(self) -> IndexArray:
        """Responses of each group."""
        return np.array([len(g.continuations) for g in self.groups], np.int64)

    @cached_property
    def length_N(self) -> IndexArray:
        """Trained tokens of each response."""
        return np.array([int(c.trained.sum()) for g in self.groups for c in g.continuations], np.int64)

    @cached_property
    def group_N(self) -> IndexArray:
        """The group of each response."""
        return np.repeat(np.arange(len(self)), self.responses_G)

    def at_N(self, name: str) -> IndexArray:
        """A column of positions within groups (``_P`` or ``_N``) as positions in the whole batch."""
        starts_G = np.cumsum(self.responses_G) - self.responses_G
        many = self.columns["pairs_G"] if name.endswith("_P") else self.responses_G
        found: IndexArray = self.columns[name] + np.repeat(starts_G, many)
        return found

    def on_device(self, device: torch.device) -> Mapping[str, torch.Tensor]:
        """The columns and ``length_N`` as tensors, moved once and together. Positions (``chosen_P``, ``rejected_P``,
        ``ranked_N``) count the responses of the whole batch, as :meth:`at_N` gives them."""
        moved: dict[str, torch.Tensor] | None = self._moved.get(device)
        if moved is None:
            placed = {name: self.at_N(name) for name in POSITIONS if name in self.columns}
            found = {**self.columns, **placed, "length_N": self.length_N}
            moved = self._moved[device] = dict(zip(found, on_device([*found.values()], device), strict=True))
        return moved

    @cached_property
    def _moved(self) -> dict[torch.device, dict[str, torch.Tensor]]:
        return {}

    def select(self, groups: Sequence[int]) -> Batch:
        """Some of the groups, in the order given, with their rows of all columns."""
        chosen = np.asarray(groups, np.int64)
        places = {axis: self.places(axis, chosen) for axis in {name[-1] for name in self.columns}}
        columns = {name: column[places[name[-1]]] for name, column in self.columns.items()}
        few = len(groups) <= AT_ONCE
        some = [self.groups[i] for i in groups] if few else Selection(self.groups, groups)
        return Batch(some, columns, self.mismatched.select(groups) if self.mismatched is not None else None)

    def places(self, axis: str, groups: IndexArray) -> IndexArray:
        """The positions on an axis (``G``, ``N``, ``P`` or ``M``) of what belongs to some groups, in their order."""
        if axis == "G":
            return groups
        if axis == "P":
            many: IndexArray = self.columns["pairs_G"]
        elif axis == "N":
            many = self.responses_G
        else:
            many = np.bincount(self.group_N, self.length_N, len(self)).astype(np.int64)
        return ranges(np.cumsum(many) - many, many, groups)


class MicroBatch(NamedTuple):
    """Some groups of a batch that go through the model at once, also packed. ``counts``: they are part of the loss, and
    are not passed through for the sake of other ranks."""

    batch: Batch
    packed: PackedBatch
    counts: bool = True


def micro_batches(scorer: PackedModel, batch: Batch, token_budget: int) -> Iterator[MicroBatch]:
    """Consecutive groups of at most ``token_budget`` tokens in total; a larger group is alone."""
    device = next(scorer.model.parameters()).device
    costs = [scorer.layout.cost(group) for group in batch.groups]
    for part in split(range(len(batch)), costs, token_budget):
        some = batch if len(part) == len(batch) else batch.select(part)
        yield MicroBatch(some, pack(some.groups, scorer.layout).to(device))


State = dict[str, dict[str, torch.Tensor]]
"""Running state of losses, by the name of the loss."""


@dataclass(frozen=True, slots=True)
class LossResult:
    """The loss of one micro-batch, or of a whole global batch.

    ``total`` is its share of the loss, to be differentiated. ``shares`` (such as ``loss`` and ``loss/dpo``) add up over
    micro-batches; ``metrics`` are pairs (sum, sum of weights). ``state`` is the losses' state afterwards. ``weights``:
    the normaliser of each share over the global batch, which is its weight in an average over batches. ``table`` [L,
    E]: tokens that each expert of each layer got, which add up too.
    """

    total: torch.Tensor
    shares: Mapping[str, torch.Tensor]
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    state: State = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    table: torch.Tensor | None = None


class Sums:
    """Sums over the micro-batches of a global batch. :meth:`means` and :meth:`of_ranks` set ``weights``, the weight of
    each metric, and ``table``, if results have one."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self.table: IndexArray | None = None
        self._table: torch.Tensor | None = None
        self._last: LossResult | None = None
        self._rows: list[torch.Tensor] = []

    def add(self, result: LossResult) -> None:
        """Add one micro-batch."""
        self._last = result
        if result.table is not None:
            self._table = result.table if self._table is None else self._table + result.table
        sums, weights = zip(*result.metrics.values(), strict=True) if result.metrics else ((), ())
        self._rows.append(torch.stack([x.detach() for x in (*result.shares.values(), *sums, *weights)]))

    def numbers(self) -> dict[str, float]:
        """The sums by kind and name, for :meth:`of_ranks`; none where nothing was added."""
        if self._last is None:
            return {}
        names = [f"share/{n}" for n in self._last.shares]
        names += [f"{kind}/{n}" for kind in ("sum", "weight") for n in self._last.metrics]
        found = dict(zip(names, torch.stack(self._rows).sum(0).tolist(), strict=True))
        # Normalisers are those of the global batch on every rank that has a row: averages of the same.
        known = {f"normaliser/{n}": float(x) for n, x in self._last.weights.items()}
        rows = [] if self._table is None else self._table.tolist()
        table = {f"table/{i}/{j}": float(x) for i, row in enumerate(rows) for j, x in enumerate(row)}
        return found | known | {f"count/{n.partition('/')[2]}": 1.0 for n in known} | table

    def of_ranks(self, totals: Mapping[str, float]) -> Record:
        """The record of :meth:`means` from the :meth:`numbers` of all ranks, added up."""
        kinds: dict[str, dict[str, float]] = {k: {} for k in ("share", "sum", "weight", "normaliser", "count", "table")}
        for key, value in totals.items():
            kind, _, name = key.partition("/")
            if kind in kinds:
                kinds[kind][name] = value
        self.weights = {n: x / kinds["count"][n] for n, x in kinds["normaliser"].items() if kinds["count"][n]}
        if cells := {tuple(map(int, name.split("/"))): x for name, x in kinds["table"].items()}:
            self.table = np.zeros(np.max([*cells], axis=0) + 1, np.int64)
            self.table[tuple(np.transpose([*cells]))] = [*cells.values()]
        weights = {name: weight for name, weight in kinds["weight"].items() if weight}
        self.weights |= weights
        return _with_margin(kinds["share"] | {name: kinds["sum"][name] / w for name, w in weights.items()})

    def means(self, norms: Mapping[str, torch.Tensor] | None = None) -> Record:
        """Sums of shares, means of metrics, and ``norms`` by name, in one transfer from the device.

        A metric without any value is left out.
        """
        assert self._last is not None
        shares, metrics, divided_by = self._last.shares, self._last.metrics, self._last.weights
        norms = norms or {}
        total = torch.stack(self._rows).sum(0)
        if more := [*norms.values(), *divided_by.values()]:
            total = torch.cat([total, torch.stack([x.detach().to(total.dtype) for x in more])])
        if self._table is not None:  # counts, which float64 holds exactly
            total = torch.cat([total, self._table.flatten().to(total.dtype)])
        numbers = total.tolist()
        if self._table is not None:
            cells = self._table.numel()
            numbers, table = numbers[:-cells], numbers[-cells:]
            self.table = np.array(table).astype(np.int64).reshape(self._table.shape)
        record = dict(zip(shares, numbers, strict=False))
        first, many = len(shares), len(metrics)
        behind = numbers[first + 2 * many :]
        self.weights = dict(zip(divided_by, behind[len(norms) :], strict=True))
        for i, name in enumerate(metrics):
            value, weight = numbers[first + i], numbers[first + many + i]
            if weight:
                record[name] = value / weight
                self.weights[name] = weight
        return _with_margin(record) | dict(zip(norms, behind, strict=False))


def _with_margin(record: Record) -> Record:
    """Where rows are not pairs, the margin is the difference of the means."""
    if "rewards/chosen" in record and "rewards/rejected" in record:
        record.setdefault("rewards/margins", record["rewards/chosen"] - record["rewards/rejected"])
    return record


def weighted_sum(metric_R: torch.Tensor, weight_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted sum, sum of weights) of a metric over rows that are not NaN; one number for all rows counts once."""
    if metric_R.ndim == 0 or len(metric_R) != len(weight_R):
        metric_R, weight_R = metric_R.reshape(-1), torch.ones_like(metric_R.reshape(-1))
    there = ~metric_R.isnan()
    return torch.where(there, metric_R * weight_R, 0.0).sum(), (weight_R * there).sum()
