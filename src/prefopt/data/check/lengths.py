"""How long prompts and responses are, in tokens or characters, and whether the preferred ones are the longer ones.

>>> lengths = Lengths("characters")
>>> lengths.add(10, [30, 20], ((0, 1),))
>>> lengths.quantiles()["chosen"]["max"], lengths.bias().longer
(30, 1)
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prefopt.core.statistics import wilson
from prefopt.data.table import Array

Unit = Literal["tokens", "characters"]
Pairs = Sequence[tuple[int, int]]

SHARES = {"min": 0, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "99%": 99, "max": 100}
BINS = 12
# A share of rows or a ratio of means this large is worth a warning, if it is not chance (at 1 %).
LARGE_SHARE, LARGE_RATIO, CERTAIN = 0.1, 1.25, 2.576


@dataclass(frozen=True, slots=True)
class Bias:
    """Whether preferred responses are longer.

    Of pairs: rows in which most preferred responses are ``longer``, ``shorter``, or neither (``equal``); ``share`` is
    longer / (longer + shorter). Of labels: ``share`` is how often a desirable response is longer than an undesirable
    one, ties counting half. ``low`` to ``high`` is its 95 % interval, ``z`` its distance from one half in standard
    errors; ``difference`` and ``ratio`` compare the means. ``large``: worth a warning.
    """

    longer: int
    shorter: int
    equal: int
    share: float
    low: float
    high: float
    z: float
    difference: float
    ratio: float

    @property
    def large(self) -> bool:
        """Certain (at 1 %) and large: the share beyond 40 to 60 %, or means that differ by a quarter."""
        ratio = max(self.ratio, 1 / self.ratio) if self.ratio > 0 else math.inf
        return abs(self.z) > CERTAIN and (abs(self.share - 0.5) >= LARGE_SHARE or ratio >= LARGE_RATIO)


class Lengths:
    """Lengths of the rows that can be used: 4 bytes each."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.prompt, self.response, self.whole = array("i"), array("i"), array("i")
        self.chosen, self.rejected, self.signs = array("i"), array("i"), array("b")
        self.difference, self.labelled = 0.0, False
        self.encoded, self.separate, self.truncated = 0, 0, 0

    def add(
        self, prompt: int, responses: Sequence[int], pairs: Pairs = (), labels: Sequence[bool] | None = None
    ) -> None:
        """One row: its prompt, its responses without it, and what is preferred to what."""
        self.prompt.append(prompt)
        self.response.extend(responses)
        self.whole.extend(prompt + n for n in responses)
        if pairs:
            worse = {b for _, b in pairs}
            self.chosen.extend(responses[k] for k in sorted({a for a, _ in pairs} - worse))
            self.rejected.extend(responses[k] for k in sorted(worse))
            differences = [responses[a] - responses[b] for a, b in pairs]
            sign = sum((d > 0) - (d < 0) for d in differences)
            self.signs.append((sign > 0) - (sign < 0))
            self.difference += sum(differences) / len(pairs)
        elif labels is not None:
            self.labelled = True
            for n, good in zip(responses, labels, strict=True):
                (self.chosen if good else self.rejected).append(n)

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Least, greatest, mean, and lengths that so many percent do not exceed; nothing of what there is none."""
        found = {}
        for name in ("prompt", "response", "chosen", "rejected", "whole"):
            values = _numbers(getattr(self, name))
            if len(values):
                at = np.percentile(values, list(SHARES.values()), method="inverted_cdf")
                found[name] = {key: int(v) for key, v in zip(SHARES, at, strict=True)} | {"mean": float(values.mean())}
        return found

    def histogram(self) -> list[tuple[int, int | None, int]]:
        """Of whole sequences: (from, up to and with, count); the last has no end and holds the longest one percent."""
        values = _numbers(self.whole if len(self.whole) else self.prompt)
        if not len(values):
            return []
        step = _round_step((int(np.percentile(values, 99)) + 1) / BINS)
        counts = np.bincount(np.minimum(values // step, BINS), minlength=BINS + 1)
        last = int(np.flatnonzero(counts)[-1])
        return [(i * step, (i + 1) * step - 1 if i < BINS else None, int(counts[i])) for i in range(last + 1)]

    def longer_than(self, limits: Sequence[int]) -> dict[int, int]:
        """How many whole sequences are longer than each of the limits."""
        values = _numbers(self.whole if len(self.whole) else self.prompt)
        return {limit: int((values > limit).sum()) for limit in limits}

    def bias(self) -> Bias | None:
        """Preferred against other responses; None where there are not both."""
        if not len(self.chosen) or not len(self.rejected):
            return None
        mean, other = float(_numbers(self.chosen).mean()), float(_numbers(self.rejected).mean())
        ratio = mean / other if other else math.inf
        if self.labelled and not len(self.signs):
            return _between(_numbers(self.chosen), _numbers(self.rejected), mean - other, ratio)
        signs = np.frombuffer(self.signs, np.int8)
        longer, shorter = int((signs > 0).sum()), int((signs < 0).sum())
        n = longer + shorter
        share = longer / n if n else 0.5
        low, high = wilson(share, n)
        z = (longer - shorter) / math.sqrt(n) if n else 0.0
        return Bias(longer, shorter, len(signs) - n, share, low, high, z, self.difference / len(signs), ratio)

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values."""
        bias = self.bias()
        return {
            "unit": self.unit,
            "quantiles": self.quantiles(),
            "histogram": [{"from": a, "to": b, "count": n} for a, b, n in self.histogram()],
            "length_bias": None if bias is None else asdict(bias) | {"large": bias.large},
        }


def bias_words(b: Bias, x: Lengths) -> str:
    """The length bias in one sentence, with its numbers."""
    interval = f"95 % interval {b.low:.1%} to {b.high:.1%}"
    means = f"{abs(b.difference):,.1f} {x.unit} {'longer' if b.difference >= 0 else 'shorter'} on average"
    if x.labelled and not len(x.signs):
        return (
            f"length bias: a desirable response is longer than an undesirable one {b.share:.1%} of the time"
            f" ({interval}), {means}"
        )
    return (
        f"length bias: chosen is longer in {b.share:.1%} of the rows where lengths differ ({interval}), {means}"
        f" ({b.ratio:.2f} times the length)"
    )


def add_columns(lengths: Lengths, columns: Mapping[str, Array]) -> None:
    """Add the groups of a chunk (:data:`prefopt.data.table.COLUMNS`), with the lengths they had before truncation."""
    for row in _rows(columns):
        lengths.add(*row)
    whole, starts = _whole(columns)
    lengths.separate += int(whole.sum())
    lengths.encoded += int(columns["tokens_G"].sum() + columns["prompt_cut_G"].sum() + columns["cut_N"].sum())
    cut = np.add.reduceat(np.append(columns["cut_N"], 0), starts[:-1]) * (columns["responses_G"] > 0)
    lengths.truncated += int(((columns["prompt_cut_G"] > 0) | (cut > 0)).sum())


def _whole(columns: Mapping[str, Array]) -> tuple[Array, Array]:
    """[N] tokens of each whole sequence before truncation, and [G + 1] where the responses of a group begin."""
    many = columns["responses_G"]
    prompt = (columns["prefix_G"] + columns["prompt_cut_G"]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(many, dtype=np.int64)])
    return np.repeat(prompt, many) + columns["length_N"] + columns["cut_N"], starts


def _rows(c: Mapping[str, Array]) -> Iterator[tuple[int, list[int], Pairs, list[bool] | None]]:
    """Prompt, responses, pairs and labels of each group; a prompt ends where its first response is first trained."""
    whole, starts = _whole(c)
    token_starts = np.concatenate([[0], np.cumsum(c["tokens_G"], dtype=np.int64)])
    pair_starts = np.concatenate([[0], np.cumsum(c["pairs_G"], dtype=np.int64)])
    trained = np.flatnonzero(c["trained_T"])
    for g in range(len(c["row_G"])):
        prompt = int(c["prefix_G"][g] + c["prompt_cut_G"][g])
        mine = slice(int(starts[g]), int(starts[g + 1]))
        if mine.stop == mine.start:
            yield prompt, [], (), None
            continue
        begin = int(token_starts[g] + c["prefix_G"][g])
        prompt += int(trained[np.searchsorted(trained, begin)]) - begin
        pairs = [(int(a), int(b)) for a, b in c["pair_P"][int(pair_starts[g]) : int(pair_starts[g + 1])]]
        labels = c["label_N"][mine].tolist()
        given = [x == 1 for x in labels] if labels[0] >= 0 else None
        yield prompt, [int(n) - prompt for n in whole[mine]], pairs, given


def _between(good: Array, bad: Array, difference: float, ratio: float) -> Bias:
    """Mann and Whitney's comparison of two sets of lengths, with the normal approximation."""
    values, counts = np.unique(bad, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    at, beyond = np.searchsorted(values, good), np.searchsorted(values, good, side="right")
    longer, not_shorter = int(below[at].sum()), int(below[beyond].sum())
    n, m = len(good), len(bad)
    share = (longer + not_shorter) / 2 / (n * m)
    error = math.sqrt((n + m + 1) / (12 * n * m))
    low, high = max(0.0, share - 1.96 * error), min(1.0, share + 1.96 * error)
    shorter, equal = n * m - not_shorter, not_shorter - longer
    return Bias(longer, shorter, equal, share, low, high, (share - 0.5) / error, difference, ratio)


def _round_step(least: float) -> int:
    """1, 2, 4, 5 or 8 times a power of ten, at least so much."""
    power = 10 ** max(0, math.floor(math.log10(max(least, 1))))
    return next(int(f * power) for f in (1, 2, 4, 5, 8, 10) if f * power >= least)


def _numbers(values: array[int]) -> npt.NDArray[np.int32]:
    return np.frombuffer(values, np.int32) if len(values) else np.empty(0, np.int32)
