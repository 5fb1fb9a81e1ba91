"""Loss results of the parts of a global batch, and their sums, left on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from prefopt.runs.metrics import Record

State = dict[str, dict[str, torch.Tensor]]
"""What losses keep from batch to batch, by the name of the loss."""


@dataclass(frozen=True, slots=True)
class LossResult:
    """An objective on one part of a global batch, or on the whole of it.

    ``total`` is the part's share of the loss, to be differentiated. ``shares`` (such as ``loss`` and ``loss/dpo``) add
    up over the parts; ``metrics`` are pairs (sum, weight of what was summed). ``state`` is the running state after it.
    ``weights``: what each share was divided by, over the whole global batch, which is its weight in an average over
    batches.
    """

    total: torch.Tensor
    shares: Mapping[str, torch.Tensor]
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    state: State = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Sums:
    """The sums over the parts of a global batch. ``weights``: of each metric, once :meth:`means` has been called."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self._last: LossResult | None = None
        self._rows: list[torch.Tensor] = []

    def add(self, result: LossResult) -> None:
        """Add one part."""
        self._last = result
        sums, weights = zip(*result.metrics.values(), strict=True) if result.metrics else ((), ())
        self._rows.append(torch.stack([x.detach() for x in (*result.shares.values(), *sums, *weights)]))

    def means(self, norms: Mapping[str, torch.Tensor] | None = None) -> Record:
        """Shares added up, metrics as means, and ``norms`` by name: the one wait for the device.

        A metric that no row had a value for is left out. Where rows are no pairs, the margin is that of the means.
        """
        assert self._last is not None
        shares, metrics, divided_by = self._last.shares, self._last.metrics, self._last.weights
        norms = norms or {}
        total = torch.stack(self._rows).sum(0)
        if beside := [*norms.values(), *divided_by.values()]:
            total = torch.cat([total, torch.stack([x.detach().to(total.dtype) for x in beside])])
        numbers = total.tolist()
        record = dict(zip(shares, numbers, strict=False))
        first, many = len(shares), len(metrics)
        behind = numbers[first + 2 * many :]
        self.weights = dict(zip(divided_by, behind[len(norms) :], strict=True))
        for i, name in enumerate(metrics):
            value, weight = numbers[first + i], numbers[first + many + i]
            if weight:
                record[name] = value / weight
                self.weights[name] = weight
        if "rewards/chosen" in record and "rewards/rejected" in record:
            record.setdefault("rewards/margins", record["rewards/chosen"] - record["rewards/rejected"])
        return record | dict(zip(norms, behind, strict=False))


def weighted_sum(metric_R: torch.Tensor, weight_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum, weight) of a metric over rows, those that are NaN left out; one number for all rows counts once."""
    if metric_R.ndim == 0 or len(metric_R) != len(weight_R):
        metric_R, weight_R = metric_R.reshape(-1), torch.ones_like(metric_R.reshape(-1))
    there = ~metric_R.isnan()
    return torch.where(there, metric_R * weight_R, 0.0).sum(), (weight_R * there).sum()
