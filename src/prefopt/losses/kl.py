"""How far one distribution is from another, estimated on samples of the first, and what steers it.

With ``log_ratio`` = log p(y) - log q(y) at samples y of p (so that r = q / p in Schulman's notation, log r =
-log_ratio), KL(p || q) is the expectation of k1 and of k3; k2 is half the square. See Schulman 2020,
http://joschu.net/blog/kl-approx.html.

As a *reward* k1 is unbiased. As a *loss* differentiated with respect to p's parameters, on samples of p, k2 has the
gradient of KL(p || q), k1's is zero in expectation, and k3's is that of KL(q || p).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def k1(log_ratio: torch.Tensor) -> torch.Tensor:
    """log p - log q: unbiased, and of high variance (it is negative at some samples)."""
    return log_ratio


def k2(log_ratio: torch.Tensor) -> torch.Tensor:
    """(log p - log q)^2 / 2: biased, of low variance where the two are near."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """q / p - 1 + log p - log q: unbiased, and never negative."""
    return torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True, slots=True)
class FixedKl:
    """A coefficient of the penalty that stays, beta."""

    coefficient: float

    def after(self, kl: float, episodes: int) -> FixedKl:
        """The same, whatever the divergence was."""
        return self

    def at(self, coefficient: float) -> FixedKl:
        """The same at another coefficient: where an interrupted run was."""
        return FixedKl(coefficient)


@dataclass(frozen=True, slots=True)
class AdaptiveKl:
    """A coefficient that brings the divergence to ``target`` nats per response, over about ``horizon`` episodes.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2, with the error clipped at 20 % as in their code.

    >>> AdaptiveKl(0.15, target=6.0, horizon=10_000).after(kl=12.0, episodes=512).coefficient
    0.151536
    """

    coefficient: float
    target: float
    horizon: float

    def after(self, kl: float, episodes: int) -> AdaptiveKl:
        """The controller for the next batch, where ``episodes`` responses had a mean divergence of ``kl`` nats."""
        error = min(0.2, max(-0.2, kl / self.target - 1))
        return self.at(self.coefficient * (1 + error * episodes / self.horizon))

    def at(self, coefficient: float) -> AdaptiveKl:
        """The same at another coefficient: where an interrupted run was."""
        return AdaptiveKl(coefficient, self.target, self.horizon)


KlController = FixedKl | AdaptiveKl
