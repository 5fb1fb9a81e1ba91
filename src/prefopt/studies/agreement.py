"""Agreement of annotators: raw agreement, Cohen's kappa, Krippendorff's alpha with an interval.

``units[u]`` maps each annotator who voted on unit u to the value of the vote, an integer.

>>> units = [{1: 0, 2: 0}, {1: 1, 2: 1}, {1: 0, 2: 1}, {1: 0, 2: 0}]
>>> raw_agreement(units), round(alpha_interval(units).value, 4), round(kappa([(0, 0), (1, 1), (0, 1), (0, 0)]), 4)
(0.75, 0.5333, 0.5)

Sources: J. Cohen, A coefficient of agreement for nominal scales, Educational and Psychological Measurement 20 (1960);
K. Krippendorff, Computing Krippendorff's alpha-reliability (2011), sections C and D for missing values and for the
ordinal metric.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prefopt.core.statistics import wilson

FloatArray = npt.NDArray[np.float64]
Unit = Mapping[int, int]
Metric = Literal["nominal", "ordinal"]
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval; nan without data."""

    value: float
    low: float
    high: float


def raw_agreement(units: Sequence[Unit]) -> float:
    """The fraction of equal values among all pairs of two annotators on one unit; nan without such a pair."""
    pairs = equal = 0
    for unit in units:
        counts = Counter(unit.values())
        pairs += math.comb(len(unit), 2)
        equal += sum(math.comb(n, 2) for n in counts.values())
    return equal / pairs if pairs else math.nan


def kappa(pairs: Sequence[tuple[int, int]]) -> float:
    """Cohen's kappa of two annotators, (po - pe) / (1 - pe); nan without pairs, or where only one value occurs."""
    if not pairs:
        return math.nan
    total = len(pairs)
    observed = sum(a == b for a, b in pairs) / total
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(first[v] * second[v] for v in first) / total**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def alpha_interval(
    units: Sequence[Unit],
    metric: Metric = "nominal",
    *,
    clusters: Sequence[object] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Krippendorff's alpha, 1 - Do / De, with a percentile bootstrap interval over units, or over ``clusters`` (one key
    per unit); nan where no unit has two values, or all values are the same.

    Units of one cluster, such as the pairs of one ranking, are resampled together. Resamples without an alpha are left
    out.
    """
    counts, kept = _coincidences(units)
    if not len(counts):
        return Estimate(math.nan, math.nan, math.nan)
    value = float(_alphas(counts.sum(axis=0)[None], metric)[0])
    if clusters is not None:
        _, member = np.unique([repr(clusters[u]) for u in kept], return_inverse=True)
        summed = np.zeros((int(member.max()) + 1, *counts.shape[1:]))
        np.add.at(summed, member, counts)
        counts = summed
    # Equal clusters are counted and drawn by a multinomial: few are distinct, however many units there are.
    size = counts.shape[1]
    different, times = np.unique(counts.reshape(len(counts), -1), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(counts), times / len(counts), size=resamples)
    found = _alphas((drawn @ different).reshape(resamples, size, size), metric)
    found = found[~np.isnan(found)]
    low, high = np.quantile(found, (0.025, 0.975)) if len(found) else (math.nan, math.nan)
    return Estimate(value, float(low), float(high))


def _coincidences(units: Sequence[Unit]) -> tuple[FloatArray, list[int]]:
    """Coincidence matrices [U, C, C] of the units with two or more values, and the indices of these units."""
    values = sorted({value for unit in units for value in unit.values()})
    number = {value: k for k, value in enumerate(values)}
    kept = [u for u, unit in enumerate(units) if len(unit) > 1]
    found = np.zeros((len(kept), len(values), len(values)))
    for row, u in zip(found, kept, strict=True):
        counts = np.bincount([number[value] for value in units[u].values()], minlength=len(values)).astype(np.float64)
        row += (np.outer(counts, counts) - np.diag(counts)) / (len(units[u]) - 1)
    return found, kept


def _alphas(o: FloatArray, metric: Metric) -> FloatArray:
    """Alphas [B] of coincidence matrices [B, C, C]: 1 - (n - 1) sum(o d) / sum(n_c n_k d)."""
    totals = o.sum(axis=2)
    n = totals.sum(axis=1)
    if metric == "nominal":
        d = np.broadcast_to(1.0 - np.eye(o.shape[1]), o.shape)
    else:
        # The squared number of values between c and k, with half of each end: the distance in ranks.
        below = np.cumsum(totals, axis=1) - totals / 2
        d = (below[:, :, None] - below[:, None, :]) ** 2
    expected = (totals[:, :, None] * totals[:, None, :] * d).sum(axis=(1, 2))
    observed = (o * d).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - (n - 1) * observed / expected, math.nan)


def share_of(share: float, count: int) -> Estimate:
    """A fraction of ``count`` trials with its Wilson interval."""
    return Estimate(share, *wilson(share, count)) if count else Estimate(math.nan, math.nan, math.nan)
