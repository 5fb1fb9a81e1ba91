"""Importance weights of responses that other weights drew: policy by what they were sampled from.

Truncated at a cap (Ionides 2008, "Truncated importance sampling"), which trades a little bias for bounded variance.
"""

from __future__ import annotations

import math

import torch

from prefopt.losses.rl import per_response, truncated_importance
from prefopt.rl.rollouts import Rollouts
from prefopt.runs.metrics import Record


def importance(rollouts: Rollouts, cap: float = math.inf, *, whole: bool) -> torch.Tensor:
    """The weight of every token [M], or with ``whole`` of every response [N], at most ``cap``."""
    both = rollouts.logp_M, rollouts.sampled_logp_M
    if whole:
        both = per_response(both[0], rollouts.length_N), per_response(both[1], rollouts.length_N)
    return truncated_importance(*both, cap)


def importance_metrics(rollouts: Rollouts, cap: float, *, whole: bool) -> Record:
    """Of the weights before they are truncated: average, largest, fraction truncated, and the effective fraction of the
    sample, (sum w)^2 / (n sum w^2)."""
    weight = importance(rollouts, whole=whole)
    return {
        "importance/mean": float(weight.mean()),
        "importance/max": float(weight.max()),
        "importance/truncated": float((weight > cap).double().mean()),
        "importance/effective": float(weight.sum().square() / (len(weight) * weight.square().sum())),
    }
