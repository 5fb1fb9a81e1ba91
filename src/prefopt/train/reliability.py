"""The reliability of a reward model on held-out pairs: accuracy, calibration, and accuracy by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prefopt.core.files import output_errors
from prefopt.core.statistics import Interval, rate_interval
from prefopt.data.table import GroupTable
from prefopt.train.columns import preference_batch

Floats = npt.NDArray[np.float64]
BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of similar confidence: mean ``confidence`` and ``accuracy``, and their fraction of the total ``weight``."""

    confidence: float
    accuracy: float
    weight: float


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Pairs whose chosen response is longer than the rejected one by ``low`` to ``high`` tokens."""

    low: int
    high: int
    accuracy: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Reliability:
    """Measurements on held-out pairs.

    ``accuracy``: the fraction of pairs in the order of the data (a tie counts half), averaged over prompts, with an
    interval over prompts (None for a single one). ``ece``: expected calibration error (Naeini et al. 2015), the mean
    distance of confidence sigma(|r1 - r2|) and accuracy over ``bins`` of equal width. ``by_length``: accuracy in
    quarters of the pairs by how much longer the chosen response is. ``longer``: the fraction of pairs whose chosen
    response is longer, which is the accuracy of length alone.
    """

    pairs: int
    accuracy: float
    interval: Interval | None
    ece: float
    bins: tuple[Bin, ...]
    by_length: tuple[LengthBin, ...]
    longer: float

    def lines(self) -> list[str]:
        """For the log."""
        i = self.interval
        sure = f" (95 % interval {i.low:.1%} to {i.high:.1%}, {i.count} prompts)" if i else ""
        gaps = ", ".join(f"{b.low:+d} to {b.high:+d}: {b.accuracy:.0%}" for b in self.by_length)
        return [
            f"held out: {self.accuracy:.1%} of {self.pairs} pairs in order{sure}; length alone {self.longer:.1%}",
            f"held out: calibration error {self.ece:.3f}; accuracy by how many tokens the chosen one is longer: {gaps}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        i = self.interval
        return {
            "pairs": self.pairs,
            "accuracy": self.accuracy,
            "accuracy_interval": [i.low, i.high] if i else None,
            "prompts": i.count if i else 1,
            "calibration_error": self.ece,
            "longer_is_chosen": self.longer,
            "reliability": [{"confidence": b.confidence, "accuracy": b.accuracy, "share": b.weight} for b in self.bins],
            "by_length": [
                {"longer_by": [b.low, b.high], "accuracy": b.accuracy, "pairs": b.pairs} for b in self.by_length
            ],
        }


def reliability(reward_N: Floats, groups: GroupTable, indices: Sequence[int], which: str = "all") -> Reliability:
    """The reliability of ``reward_N``, the rewards of the responses of ``groups[indices]``."""
    batch = preference_batch([groups[i] for i in indices], "pairs", which, merge=True)
    chosen_P, rejected_P = batch.at_N("chosen_P"), batch.at_N("rejected_P")
    weight_P, label_P = batch.columns["weight_P"], batch.columns["label_P"]
    prompt_G = np.unique(groups.prompt_key_G[np.asarray(indices)], return_inverse=True)[1].reshape(-1)
    prompt_P = prompt_G[batch.group_N[chosen_P]]
    gap_P = reward_N[chosen_P] - reward_N[rejected_P]
    longer_P = batch.length_N[chosen_P] - batch.length_N[rejected_P]
    # The fraction of votes that agree with the order.
    right_P = 0.5 + (label_P - 0.5) * np.sign(gap_P)
    per_prompt = np.bincount(prompt_P, weight_P * right_P) / np.bincount(prompt_P, weight_P)
    ece, bins = calibration(1 / (1 + np.exp(-np.abs(gap_P))), right_P, weight_P)
    return Reliability(
        len(gap_P),
        float(per_prompt.mean()),
        rate_interval(per_prompt) if len(per_prompt) > 1 else None,
        ece,
        bins,
        _by_length(longer_P, right_P),
        float(np.average(0.5 + 0.5 * np.sign(longer_P), weights=weight_P)),
    )


def calibration(confidence: Floats, right: Floats, weight: Floats, bins: int = BINS) -> tuple[float, tuple[Bin, ...]]:
    """The expected calibration error, and the non-empty bins of equal width between 0.5 and 1.

    >>> ece, found = calibration(np.array([0.6, 0.6, 0.9]), np.array([1.0, 0.0, 1.0]), np.ones(3))
    >>> round(ece, 3), [(round(b.confidence, 3), b.accuracy, round(b.weight, 3)) for b in found]
    (0.1, [(0.6, 0.5, 0.667), (0.9, 1.0, 0.333)])
    """
    share = weight / weight.sum()
    number = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for b in range(bins):
        if (here := number == b).any():
            mass = share[here]
            sure, correct = (float(np.average(x[here], weights=mass)) for x in (confidence, right))
            found.append(Bin(sure, correct, float(mass.sum())))
    return sum(b.weight * abs(b.confidence - b.accuracy) for b in found), tuple(found)


def _by_length(longer_R: npt.NDArray[np.int64], right_R: Floats) -> tuple[LengthBin, ...]:
    """Quarters of the pairs; fewer where many have the same gap."""
    edges = np.unique(np.quantile(longer_R, [0.25, 0.5, 0.75], method="inverted_cdf"))
    number = np.searchsorted(edges, longer_R)
    found = []
    for b in np.unique(number):
        here = number == b
        gaps = longer_R[here]
        found.append(LengthBin(int(gaps.min()), int(gaps.max()), float(right_R[here].mean()), int(here.sum())))
    return tuple(found)


def draw(found: Reliability, path: Path) -> None:
    """Write the reliability plot as SVG: confidence against accuracy, the area of a point by its fraction of pairs."""
    left, top, size = 60, 40, 320

    def x(value: float) -> float:
        return left + size * (value - 0.5) * 2

    def y(value: float) -> float:
        return top + size * (1 - value)

    ticks = [
        *(f'<text x="{x(t)}" y="{top + size + 16}" text-anchor="middle">{t:g}</text>' for t in np.arange(5, 11) / 10),
        *(f'<text x="{left - 6}" y="{y(t) + 4}" text-anchor="end">{t:g}</text>' for t in np.arange(5) / 4),
    ]
    points = [
        f'<circle cx="{x(b.confidence):.1f}" cy="{y(b.accuracy):.1f}" r="{3 + 15 * b.weight**0.5:.1f}" fill="#0072B2"'
        f' fill-opacity="0.7"><title>{b.weight:.0%} of the pairs: confidence {b.confidence:.2f},'
        f" in order {b.accuracy:.2f}</title></circle>"
        for b in found.bins
    ]
    head = f"Reliability on {found.pairs} held-out pairs: calibration error {found.ece:.3f}"
    svg = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size + 2 * left} {size + 2 * top + 30}" font-family="sans-serif"
 font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="{left}" y="24" font-size="14">{head}</text>
<path d="M{x(0.5)} {y(0.5)} L{x(1)} {y(1)}" stroke="#888" stroke-dasharray="4 3" fill="none"/>
<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#444"/>
<text x="{left + size / 2}" y="{top + size + 36}" text-anchor="middle">confidence, σ(|r₁ − r₂|)</text>
<text transform="translate(18 {top + size / 2}) rotate(-90)" text-anchor="middle">fraction in order</text>
"""
    with output_errors(path):
        path.write_text(svg + "\n".join([*ticks, *points, "</svg>"]) + "\n", encoding="utf-8")
