"""What the first step's numbers must be, before any weight has moved."""

from __future__ import annotations

import math

import torch

from prefopt.errors import RunError
from prefopt.model.check import CheckReport
from prefopt.runs.metrics import Record
from prefopt.train.batch import Batch
from prefopt.train.inputs import Values
from prefopt.train.objective import DIFFERENTIATED, PreferenceObjective

MANY = 8
"""Groups in a batch from which an accuracy of exactly 1 is no accident."""


def at_reference(
    objective: PreferenceObjective, check: CheckReport, batch: Batch, values: Values
) -> tuple[float, float]:
    """The loss of a policy that is its reference, and how far rounding may take it from there."""
    same = objective.at_reference(batch, values)
    leaves = [same[name].detach().requires_grad_() for name in DIFFERENTIATED if name in same]
    named = dict(zip([name for name in DIFFERENTIATED if name in same], leaves, strict=True))
    with torch.enable_grad():
        total = objective(batch, {**same, **named}, objective.normaliser(batch)).total
        slopes = torch.autograd.grad(total, leaves, allow_unused=True)
    tokens = int(batch.length_N.max())
    slope = sum(float(s.abs().sum()) for s in slopes if s is not None)
    expected = float(total.detach())
    return expected, 2 * slope * check.tolerance(tokens) + 1e-6 * max(1.0, abs(expected))


def inspect_first(
    objective: PreferenceObjective, check: CheckReport | None, record: Record, batch: Batch, values: Values
) -> str | None:
    """What to say of the first step; ``check`` is none where the reference is not the policy as it starts.

    Raises :class:`RunError` where the loss of an untrained policy is not what it must be.
    """
    if not objective.needs_reference:
        return None
    if check is None:
        if record.get("rewards/accuracies") == 1.0 and len(batch) >= MANY:
            return (
                "step 1: accuracy is 1.0 before any weight moved: the policy has seen these preferences and the"
                " reference has not. Is --reference the model that training should be judged from?"
            )
        return None
    expected, allowed = at_reference(objective, check, batch, values)
    number = f"{'ln 2 = ' if abs(expected - math.log(2)) < 1e-6 else ''}{expected:.6f}"
    if not abs(record["loss"] - expected) <= allowed:
        raise RunError(
            f"step 1: the loss is {record['loss']:.6f} where an untrained policy has {number}"
            f" (rounding explains {allowed:.1g}): the reference's values are not this model's. Check them with"
            " prefopt cache verify, or remove them with prefopt cache clear"
        )
    return f"step 1: loss {record['loss']:.6f}, {number}, as it must be before any weight moves"
