"""How often tests call one of two models better, equal or not: python benchmarks/verdicts.py (minutes on one core).

Each line is 500 simulated comparisons: prompts, samples per prompt, standard deviation of the prompts' lean in
log-odds, fraction of ties, and the percentage with p at most 5 % of: the sign-flip test of prompts' mean outcomes;
Wilcoxon's signed ranks, by exact flips; Student's t; the sign test over prompts; and the rule of two tests that agree
(interval and sign test). In the second half of the lines one model is better.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import stats

from prefopt.core.statistics import rate_interval, sign_flip_test

NAMES = ("sign-flip", "Wilcoxon", "Student", "sign", "two tests")
DESIGNS = ((1, 0.0, 0.0), (1, 1.0, 0.2), (1, 0.0, 0.8), (4, 1.0, 0.2), (4, 0.0, 0.0), (8, 2.0, 0.1))


def drawn(rng: np.random.Generator, prompts: int, samples: int, spread: float, tie: float, lean: float) -> np.ndarray:
    """Mean outcomes of prompts."""
    chance = 1 / (1 + np.exp(-(lean + spread * rng.normal(size=(prompts, 1)))))
    u = rng.random((prompts, samples))
    return np.where(u < (1 - tie) * chance, 1.0, np.where(u < (1 - tie) * chance + tie, 0.5, 0.0)).mean(1)


def verdicts(means: np.ndarray) -> Iterator[bool]:
    values = means - 0.5
    yield sign_flip_test(values) <= 0.05
    some = values[values != 0]
    yield len(some) > 0 and sign_flip_test(np.sign(some) * stats.rankdata(np.abs(some))) <= 0.05
    yield bool(stats.ttest_1samp(values, 0).pvalue <= 0.05) if values.std() else bool(values[0])
    above, below = int((values > 0).sum()), int((values < 0).sum())
    sign = bool(above + below) and stats.binomtest(above, above + below).pvalue < 0.05
    yield sign
    yield sign and rate_interval(means).excludes(0.5) and (above > below) == (values.mean() > 0)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    print("prompts, samples, spread, ties:", *NAMES, sep="  ", flush=True)
    for better in (False, True):
        for prompts in (20, 100):
            for samples, spread, tie in DESIGNS:
                lean = better * 5 / prompts**0.5 * (0.25 / samples + (0.2 * spread) ** 2) ** 0.5
                found = [list(verdicts(drawn(rng, prompts, samples, spread, tie, lean))) for _ in range(500)]
                rates = "  ".join(f"{100 * x:.1f}" for x in np.mean(found, 0))
                print(f"{prompts}, {samples}, {spread:g}, {tie:g}{', one better' * better}: {rates}", flush=True)
