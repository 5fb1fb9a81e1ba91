"""Functions of numbers that stay finite, in value and gradient, where the plain formula overflows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

LINE = 30.0  # exp(30) is 1e13; its square still fits into float32


def expm1_or_line(x: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 up to x = 30, and its tangent there beyond: finite, rising, and with a gradient everywhere."""
    low = x.clamp(max=LINE)  # passes no gradient where the line has taken over
    return torch.expm1(low) + math.exp(LINE) * torch.relu(x - LINE)


def log1m_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation on either side of -log 2."""
    middle = -0.6931471805599453
    near, far = x.clamp(min=middle), x.clamp(max=middle)
    return torch.where(x > middle, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def logistic(margin: torch.Tensor, label_smoothing: float = 0.0, label: torch.Tensor | None = None) -> torch.Tensor:
    """-p log sigmoid(margin) - (1 - p) log sigmoid(-margin), element by element.

    p is the probability that the chosen response is the better one: ``label``, or 1 where there is none, of which
    ``label_smoothing`` e is assumed to be flipped: p (1 - e) + (1 - p) e.
    """
    if label is None and not label_smoothing:
        return -F.logsigmoid(margin)
    right = 1.0 if label is None else label.to(margin.dtype)
    p = right * (1 - label_smoothing) + (1 - right) * label_smoothing
    return -p * F.logsigmoid(margin) - (1 - p) * F.logsigmoid(-margin)


def hashed(x: torch.Tensor) -> torch.Tensor:
    """Whole numbers [...] below 2^32 that look drawn at random, the same for the same int64 ``x``, on any device.

    A generator's state would have to be told to the device and be waited for.
    """
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
