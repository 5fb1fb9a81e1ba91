"""The learning rate that is suggested where none is given.

Published rates are for models of half a billion weights and more, and hold over a factor of ten in size: 3e-7 to 1e-6
for DPO, 3e-6 for PPO. Smaller models need more to move as far in as many updates: 1e-4 to 2e-4 for a Llama of 6.5
million weights, 3e-5 to 3e-4 for one of 58,000 (docs/results.md). So the rate grows in proportion to 1 / weights, up to
1e-4.
"""

from __future__ import annotations

AUTO = "auto"
LARGE = 500_000_000
"""Weights from which on the published rate is suggested."""
SMALL_RATE = {False: 1e-4, True: 3e-4}
"""The most for full training, and for LoRA, at the usual batch and number of updates."""
UPDATES = 200
"""Updates that rates of small models were measured with."""
BOUND = 3.0
"""Most that the number of updates, and the batch, change a rate by."""


def suggested_rate(published: float, weights: int, *, updates: int, batch: int, usual_batch: int, most: float) -> float:
    """The peak learning rate for a model of so many ``weights``, an adapter's base included, that makes ``updates``
    updates on ``batch`` rows each, where ``usual_batch`` is the default of the method.

    ``published`` from :data:`LARGE` weights on; below, min(published * LARGE / weights, most) * sqrt(UPDATES / updates)
    * sqrt(batch / usual_batch), each root within BOUND, and never less than ``published``. The first root: with fewer
    updates each must go further. The second is that of Adam for batches (Malladi et al. 2022, arXiv 2205.10287). Both
    fade in between LARGE and a tenth of it, so that the rate has no jump.

    >>> suggested_rate(1e-6, 7_000_000_000, updates=2000, batch=64, usual_batch=16, most=1e-4)
    1e-06
    >>> [round(suggested_rate(1e-6, 58_000, updates=n, batch=16, usual_batch=16, most=1e-4), 6) for n in (40, 200)]
    [0.000224, 0.0001]
    """
    if weights >= LARGE:
        return published
    smaller = LARGE / max(1, weights)
    roots = _bounded((UPDATES / max(1, updates)) ** 0.5) * _bounded((batch / usual_batch) ** 0.5)
    fade = min(1.0, (smaller - 1) / 9)
    return float(max(published, min(published * smaller, most) * roots**fade))


def _bounded(factor: float) -> float:
    return min(BOUND, max(1 / BOUND, factor))
