"""Win rates at equal length: what would remain of a win rate if the responses of both models were equally long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from prefopt.core.statistics import MIN_PROMPTS, Interval, student
from prefopt.evaluate.win_rate import Floats

APART = 0.02
"""Rates at equal length this far apart are both reported."""


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """``rate``: win rate predicted for responses of equal length. ``linear``: the same if the log-odds of winning grew
    without end, in proportion to the difference of length. ``slope``: change of the log-odds per standard deviation of
    the difference, at equal length. All are None where one model's responses are longer in every comparison: the
    prediction at equal length would be an extrapolation."""

    rate: Interval | None
    slope: Interval | None
    linear: Interval | None = None

    @property
    def differs(self) -> bool:
        """Whether the two rates are at least :data:`APART`, or one interval holds 1/2 and the other does not."""
        if self.rate is None or self.linear is None:
            return False
        return abs(self.rate.mean - self.linear.mean) >= APART or self.rate.excludes(0.5) != self.linear.excludes(0.5)


def length_controlled(outcomes: npt.ArrayLike, longer: npt.ArrayLike) -> LengthControlled | None:
    r"""The length-controlled win rate of outcomes [prompts, samples]; ``longer``: differences of length.

    A logistic regression of the outcome on the difference d, with s the standard deviation of d:
    :math:`\operatorname{logit} P = a + b\,d/s + c\tanh(d/s)`, evaluated at d = 0. Judges stop caring how much longer a
    response is: where the models' lengths differ by more than a standard deviation, a straight line alone ascribes to
    quality what length does. With both terms the rate is unbiased for effects that grow in proportion, level off, or
    are a step (``tests/evaluate/test_length_control.py``).

    AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) has the term :math:`\tanh(d/s)` without the straight line, and a
    term for the difficulty of each instruction, learned from the outcomes of many models against one baseline; its
    coefficients are regularised. Here there are two models, and no difficulty is known.

    A tie is an outcome of 1/2 (quasi-likelihood). Two prompts are added at d = 0, one won and one lost: the prior
    log-F(2, 2) on a (Greenland and Mansournia 2015, section 3). b and c have wide normal priors, of standard deviation
    10. Both keep the fit finite where one model always wins or length alone decides, for which the likelihood has no
    maximum. Bounds are Student's with standard errors clustered by prompt (Liang and Zeger 1986); the priors of b and c
    count as one more observation. None below :data:`~prefopt.core.statistics.MIN_PROMPTS` prompts, and where all
    responses are equally long.
    """
    y, d = np.asarray(outcomes, np.float64), np.asarray(longer, np.float64)
    decided = ~np.isnan(y)
    prompt = np.unique(np.broadcast_to(np.arange(len(y))[:, None], y.shape)[decided], return_inverse=True)[1]
    y, d = y[decided], d[decided]
    prompts = int(prompt.max(initial=-1)) + 1
    if prompts < MIN_PROMPTS or not d.any():
        return None
    if d.min() > 0 or d.max() < 0:
        return LengthControlled(None, None)
    z = d / float(d.std(ddof=1))
    rate, slope = _at_zero(y, np.stack([z, np.tanh(z)], 1), prompt)
    return LengthControlled(rate, slope, _at_zero(y, z[:, None], prompt)[0])


def _at_zero(y: Floats, terms: Floats, prompt: npt.NDArray[np.int64]) -> tuple[Interval, Interval]:
    """The rate where all ``terms`` [samples, terms] are 0, and the sum of their coefficients."""
    prompts, count = int(prompt.max()) + 1, terms.shape[1]
    x = np.column_stack([np.ones(len(y) + 2), np.concatenate([terms, np.zeros((2, count))])])
    y, prompt = np.append(y, [1, 0]), np.append(prompt, [prompts, prompts + 1])
    prior = np.diag([0.0, *[1e-2] * count])
    beta = _logistic_regression(x, y, prior)
    p = expit(x @ beta)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + prior)
    scores = np.zeros((prompts + 2, 1 + count))
    np.add.at(scores, prompt, x * (y - p)[:, None])
    cover = bread @ (scores.T @ scores * (prompts + 2) / (prompts + 1) + prior) @ bread
    error, error_of_sum = float(cover[0, 0]) ** 0.5, float(cover[1:, 1:].sum()) ** 0.5
    width, middle, total = student(prompts + 1), float(beta[0]), float(beta[1:].sum())
    slope = Interval(total, total - width * error_of_sum, total + width * error_of_sum, prompts)
    # On each side the wider of two intervals: of the log-odds, and of the rate itself (delta method). Near 1 the former
    # excludes rates that so few losses cannot rule out.
    rate, below, above = (float(expit(middle + side * width * error)) for side in (0, -1, 1))
    delta = rate * (1 - rate) * width * error
    return Interval(rate, max(0.0, min(below, rate - delta)), min(1.0, max(above, rate + delta)), prompts), slope


def _logistic_regression(x: Floats, y: Floats, prior: Floats) -> Floats:
    """Coefficients of maximal penalised likelihood, by Newton's method."""
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = expit(x @ beta)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(hessian, x.T @ (y - p) - prior @ beta)
        beta += step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-12:
            break
    return beta
