"""Sums of a global batch over its micro-batches, left on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from prefopt.runs.metrics import Record

State = dict[str, dict[str, torch.Tensor]]


class Outcome(NamedTuple):
    """What an objective makes of one part of a global batch, or of the whole.

    ``total`` is the part's share of the loss, to be differentiated. ``shares`` (such as ``loss`` and ``loss/dpo``) are
    to be added up over the parts; ``metrics`` are pairs (sum, weight of what was summed). ``state`` is the running
    state after it. ``divided_by``: what a share was divided by, over the whole global batch: its weight in an average
    over batches.
    """

    total: torch.Tensor
    shares: Mapping[str, torch.Tensor]
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    state: State
    divided_by: Mapping[str, torch.Tensor] = MappingProxyType({})


class Sums:
    """What the parts of a global batch add up to. ``weights``: of each metric, once :meth:`means` has been asked."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self._divided_by: Mapping[str, torch.Tensor] = {}
        self._shares: tuple[str, ...] = ()
        self._metrics: tuple[str, ...] = ()
        self._rows: list[torch.Tensor] = []

    def add(self, outcome: Outcome) -> None:
        """One part."""
        self._shares, self._metrics = tuple(outcome.shares), tuple(outcome.metrics)
        self._divided_by = outcome.divided_by
        sums, weights = zip(*outcome.metrics.values(), strict=True) if outcome.metrics else ((), ())
        self._rows.append(torch.stack([x.detach() for x in (*outcome.shares.values(), *sums, *weights)]))

    def means(self, norm: torch.Tensor | None = None) -> Record:
        """Shares added up, metrics as means, and ``grad_norm`` where one is given: the one wait for the device.

        A metric that no row had a value for is left out. Where rows are no pairs, the margin is that of the means.
        """
        total = torch.stack(self._rows).sum(0)
        beside = [*([norm] if norm is not None else []), *self._divided_by.values()]
        if beside:
            total = torch.cat([total, torch.stack([x.detach().to(total.dtype) for x in beside])])
        numbers = total.tolist()
        self.weights = dict(zip(self._divided_by, numbers[len(numbers) - len(self._divided_by) :], strict=True))
        record = dict(zip(self._shares, numbers, strict=False))
        first, many = len(self._shares), len(self._metrics)
        for i, name in enumerate(self._metrics):
            value, weight = numbers[first + i], numbers[first + many + i]
            if weight:
                record[name] = value / weight
                self.weights[name] = weight
        if "rewards/chosen" in record and "rewards/rejected" in record:
            record.setdefault("rewards/margins", record["rewards/chosen"] - record["rewards/rejected"])
        return record if norm is None else record | {"grad_norm": numbers[first + 2 * many]}


def summed(metric_R: torch.Tensor, weight_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, weight) of a metric over rows, those that are NaN left out; one number for all rows counts once."""
    if metric_R.ndim == 0 or len(metric_R) != len(weight_R):
        metric_R, weight_R = metric_R.reshape(-1), torch.ones_like(metric_R.reshape(-1))
    there = ~metric_R.isnan()
    return torch.where(there, metric_R * weight_R, 0.0).sum(), (weight_R * there).sum()
