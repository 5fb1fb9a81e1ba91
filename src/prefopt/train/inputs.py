"""The inputs of losses by name: from the columns of a batch and the values of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from prefopt.data.table import IndexArray
from prefopt.losses.declare import Kind
from prefopt.train.batch import Batch, Column, tensor
from prefopt.train.results import weighted_sum

Values = dict[str, torch.Tensor]
"""Tensors by name: per response (``logp_N``), token (``logp_M``) or pair (``chosen_head_logp_P``)."""


@dataclass
class LossInputs:
    """A batch as losses of ``kind`` see it. Their rows R are its pairs, its labelled responses, or its rankings."""

    batch: Batch
    kind: Kind
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def chosen(self) -> IndexArray:
        """The chosen response [N] of each pair."""
        return self.batch.at_N("chosen_P")

    @cached_property
    def rejected(self) -> IndexArray:
        """The rejected response [N] of each pair."""
        return self.batch.at_N("rejected_P")

    @cached_property
    def length_N(self) -> torch.Tensor:
        """Trained tokens of each response."""
        return self.tensor(self.batch.length_N, self.dtype)

    @cached_property
    def weight_R(self) -> torch.Tensor:
        """Weight of each pair; labelled responses and rankings weigh 1."""
        if self.kind == "pairs":
            return self.tensor(self.batch.columns["weight_P"], self.dtype)
        rows = len(self.batch) if self.kind == "ranking" else len(self.batch.length_N)
        return torch.ones(rows, dtype=self.dtype, device=self.device)

    @cached_property
    def head_R(self) -> IndexArray:
        """Tokens of the shorter response of each pair."""
        length = self.batch.length_N
        shorter: IndexArray = np.minimum(length[self.chosen], length[self.rejected])
        return shorter

    def tensor(self, column: Column, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A column on the device."""
        return tensor(column, self.device, dtype)

    def named(self, names: Iterable[str], optional: Iterable[str], values: Values) -> Values:
        """The tensors that losses ask for by name. What ``values`` lacks stands at zero.

        Optional ones are left out where the data say nothing by them.
        """
        return {name: self._named(name, values) for name in {*names, *(n for n in optional if self._tells(n))}}

    def _tells(self, name: str) -> bool:
        return name != "label_P" or bool((self.batch.columns["label_P"] != 1).any())

    def _named(self, name: str, values: Values) -> torch.Tensor:
        columns = self.batch.columns
        if self.kind == "pairs":
            if name == "label_P":
                return self.tensor(columns["label_P"], self.dtype)
            if "_head_" in name:
                return values.get(name, torch.zeros_like(self.weight_R))
            side, _, word = name.removesuffix("_P").partition("_")
            return self._of_responses(f"{word}_N", values)[self.tensor(getattr(self, side))]
        if self.kind == "labels":
            return self.tensor(columns["label_N"]) if name == "label_N" else self._of_responses(name, values)
        if name == "tier_N":  # stays where it is: losses read it number by number
            return torch.from_numpy(columns["tier_N"])
        if name == "group_N":
            return torch.from_numpy(self._group_N)
        return self._of_responses(name, values)[self.tensor(self.batch.at_N("ranked_N"))]

    @property
    def _group_N(self) -> IndexArray:
        return np.repeat(np.arange(len(self.batch)), self.batch.responses_G)

    def _of_responses(self, name: str, values: Values) -> torch.Tensor:
        if name == "length_N":
            return self.length_N
        if name == "score_N":
            return self.tensor(self.batch.columns["score_N"], self.dtype)
        found = values.get(name)
        return torch.zeros_like(self.length_N) if found is None else found

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
        """Which responses count as ``chosen`` and as ``rejected``, and their weights."""
        columns = self.batch.columns
        if self.kind == "pairs":
            return {side: (self.tensor(getattr(self, side)), self.weight_R) for side in ("chosen", "rejected")}
        if self.kind == "labels":
            label = self.tensor(columns["label_N"], self.dtype)
            return {"chosen": (None, self.weight_R * label), "rejected": (None, self.weight_R * (1 - label))}
        tier, group = columns["tier_N"], self._group_N
        last = np.zeros(len(self.batch), np.int64)
        np.maximum.at(last, group, tier)
        ranked = self.tensor(self.batch.at_N("ranked_N"))
        first, worst = (self.tensor(x, self.dtype) for x in (tier == 0, tier == last[group]))
        return {"chosen": (ranked, first), "rejected": (ranked, worst)}


def head_sums(
    values_M: torch.Tensor, starts_N: IndexArray, response_R: IndexArray, count_R: IndexArray
) -> torch.Tensor:
    """Sums [R] of the first ``count_R`` token values of responses, of which n's values begin at ``starts_N[n]``."""
    ends = np.cumsum(count_R)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - count_R, count_R)
    at = torch.from_numpy(np.repeat(starts_N[response_R], count_R) + within).to(values_M.device)
    owner = torch.from_numpy(np.repeat(np.arange(len(count_R)), count_R)).to(values_M.device)
    return values_M.new_zeros(len(count_R)).index_add(0, owner, values_M[at])
