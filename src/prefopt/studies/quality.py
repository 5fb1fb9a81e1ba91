"""Annotators whose votes should be looked at: too fast to have read, or always for the same side.

>>> flags_of([0.4] * 12, ahead=6, behind=6), flags_of([20.0] * 12, ahead=12, behind=0), flags_of([20.0] * 9, 9, 0)
(('fast',), ('one side',), ())
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from scipy.special import bdtr

FEWEST = 10
"""Votes below which nobody is flagged."""
FAST_SECONDS = 2.0
FAST_SHARE = 0.25
ONE_SIDE = 0.001

Flag = Literal["fast", "one side"]
MEANING: dict[Flag, str] = {
    "fast": f"median under {FAST_SECONDS:g} s, or under {FAST_SHARE:.0%} of the other annotators' median",
    "one side": f"prefers the response shown first, or the one shown second: exact binomial test at {ONE_SIDE:.1%}",
}


def flags_of(seconds: Sequence[float], ahead: int, behind: int, others: Sequence[float] = ()) -> tuple[Flag, ...]:
    """The flags of an annotator who took ``seconds`` for each vote and preferred the response shown first ``ahead``
    times and another ``behind`` times; ``others`` are the medians of the other annotators. See :data:`MEANING`."""
    found: list[Flag] = []
    if len(seconds) >= FEWEST:
        slowest = max(FAST_SECONDS, FAST_SHARE * statistics.median(others)) if others else FAST_SECONDS
        if statistics.median(seconds) < slowest:
            found.append("fast")
    count = ahead + behind
    # The exact two-sided test of one half: its distribution is symmetric.
    if count >= FEWEST and 2 * float(bdtr(min(ahead, behind), count, 0.5)) < ONE_SIDE:
        found.append("one side")
    return tuple(found)
