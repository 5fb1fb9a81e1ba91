"""A batch: some groups, and named columns of what is known of them.

The last letter of a column's name is its axis: ``_G`` groups, ``_N`` responses (those of all groups end to end), ``_M``
trained tokens (those of all responses end to end), ``_P`` pairs. Positions within a column, such as ``chosen_P``, count
the responses of their own group, so that a part of a batch is cut out column by column.

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

Column = npt.NDArray[Any]
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
    def starts_G(self) -> IndexArray:
        """Position of the first response of each group."""
        starts: IndexArray = np.cumsum(self.responses_G) - self.responses_G
        return starts

    def at_N(self, name: str) -> IndexArray:
        """A column of positions within groups (``_P`` or ``_N``) as positions in the whole batch."""
        many = self.columns["pairs_G"] if name.endswith("_P") else self.responses_G
        found: IndexArray = self.columns[name] + np.repeat(self.starts_G, many)
        return found

    def select(self, groups: Sequence[int]) -> Batch:
        """Some of the groups, in the order given, with their parts of all columns."""
        chosen = np.asarray(groups, np.int64)
        places = {axis: self._places(axis, chosen) for axis in {name[-1] for name in self.columns}}
        columns = {name: column[places[name[-1]]] for name, column in self.columns.items()}
        few = len(groups) <= AT_ONCE
        some = [self.groups[i] for i in groups] if few else Selection(self.groups, groups)
        return Batch(some, columns, self.mismatched.select(groups) if self.mismatched is not None else None)

    def _places(self, axis: str, groups: IndexArray) -> IndexArray:
        if axis == "G":
            return groups
        if axis == "P":
            many: IndexArray = self.columns["pairs_G"]
        elif axis == "N":
            many = self.responses_G
        else:
            owner = np.repeat(np.arange(len(self)), self.responses_G)
            many = np.bincount(owner, self.length_N, len(self)).astype(np.int64)
        return ranges(np.cumsum(many) - many, many, groups)


class MicroBatch(NamedTuple):
    """As much of a batch as goes through the model at once, and the same packed for it."""

    batch: Batch
    packed: PackedBatch


def micro_batches(scorer: PackedModel, batch: Batch, token_budget: int) -> Iterator[MicroBatch]:
    """A batch cut, in its order, into parts of at most ``token_budget`` tokens; a larger group stands alone."""
    device = next(scorer.model.parameters()).device
    costs = [scorer.layout.cost(group) for group in batch.groups]
    for part in split(range(len(batch)), costs, token_budget):
        some = batch if len(part) == len(batch) else batch.select(part)
        yield MicroBatch(some, pack(some.groups, scorer.layout).to(device))


def tensor(column: Column, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A column on the device."""
    return torch.from_numpy(np.ascontiguousarray(column)).to(device, dtype, non_blocking=True)
