"""What losses are told about some groups, known before anything is scored, and where each tensor comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from prefopt.data.group import Group
from prefopt.losses.declare import Kind
from prefopt.train import rows as items

Values = dict[str, torch.Tensor]
"""Tensors by name: per response (``logp_N``) or per pair (``chosen_head_logp_G``), in the order of the groups."""


@dataclass
class Facts:
    """Some groups, seen as what losses of ``kind`` are computed on. ``which``: see :data:`items.WHICH`."""

    groups: Sequence[Group]
    kind: Kind
    which: str
    merge: bool
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def rows(self) -> items.Pairs | items.Labels | items.Rankings:
        """The pairs, labelled responses or rankings."""
        if self.kind == "pairs":
            return items.pairs_of(self.groups, self.which, merge=self.merge)
        return items.labels_of(self.groups) if self.kind == "labels" else items.rankings_of(self.groups)

    @cached_property
    def pairs(self) -> items.Pairs:
        """The pairs, of the kind that has them."""
        assert isinstance(self.rows, items.Pairs)
        return self.rows

    @cached_property
    def length_N(self) -> torch.Tensor:
        """Trained tokens of each response."""
        return self.tensor(items.lengths_of(self.groups), self.dtype)

    @cached_property
    def weight_R(self) -> torch.Tensor:
        """Weight of each pair, labelled response or (always 1) ranking."""
        rows = self.rows
        return self.tensor(np.ones(len(self.groups)) if isinstance(rows, items.Rankings) else rows.weight, self.dtype)

    @cached_property
    def head_R(self) -> items.Ints:
        """Tokens of the shorter response of each pair."""
        length = items.lengths_of(self.groups)
        shorter: items.Ints = np.minimum(length[self.pairs.chosen], length[self.pairs.rejected])
        return shorter

    def tensor(self, array: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An array on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, dtype, non_blocking=True)

    def inputs(self, names: Iterable[str], optional: Iterable[str], values: Values) -> Values:
        """The tensors that losses ask for by name. What ``values`` lacks stands at zero.

        Optional ones are left out where the data say nothing by them.
        """
        return {name: self._input(name, values) for name in {*names, *(n for n in optional if self._tells(n))}}

    def _tells(self, name: str) -> bool:
        return name != "label_G" or bool((self.pairs.label != 1).any())

    def _input(self, name: str, values: Values) -> torch.Tensor:
        rows = self.rows
        if isinstance(rows, items.Pairs):
            if name == "label_G":
                return self.tensor(rows.label, self.dtype)
            if "_head_" in name:
                return values.get(name, torch.zeros_like(self.weight_R))
            side, _, word = name.removesuffix("_G").partition("_")
            index = rows.chosen if side == "chosen" else rows.rejected
            return self._of_responses(f"{word}_N", values)[self.tensor(index)]
        if name in ("tier_N", "group_N"):  # these stay where they are: losses read them number by number
            return torch.from_numpy(getattr(rows, name[:-2]))
        if name == "label_N":
            return self.tensor(getattr(rows, "label"))  # noqa: B009
        return self._of_responses(name, values)[self.tensor(rows.response)]

    def _of_responses(self, name: str, values: Values) -> torch.Tensor:
        if name == "length_N":
            return self.length_N
        if name == "score_N":
            return self.tensor(items.scores_of(self.groups), self.dtype)
        found = values.get(name)
        return torch.zeros_like(self.length_N) if found is None else found


def head_sums(
    values_M: torch.Tensor, starts_N: items.Ints, response_R: items.Ints, count_R: items.Ints
) -> torch.Tensor:
    """Sums [R] of the first ``count_R`` token values of responses, of which n's values begin at ``starts_N[n]``."""
    ends = np.cumsum(count_R)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - count_R, count_R)
    at = torch.from_numpy(np.repeat(starts_N[response_R], count_R) + within).to(values_M.device)
    owner = torch.from_numpy(np.repeat(np.arange(len(count_R)), count_R)).to(values_M.device)
    return values_M.new_zeros(len(count_R)).index_add(0, owner, values_M[at])
