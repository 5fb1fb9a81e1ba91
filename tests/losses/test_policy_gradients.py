"""GRPO, DAPO, GSPO and RLOO against slow code that says what they do: values, gradients by finite differences, cuts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prefopt.data.group import Group
from prefopt.losses.rl import averaged_tokens, averaging_weight, group_relative, overlong_penalty, policy_loss
from prefopt.rl.policy_gradient import PolicyGradient
from prefopt.train.batch import Batch

LENGTHS = [[3, 1], [5, 2, 4], [1, 1]]
LONGEST = 6


def batch(seed: int = 0) -> Batch:
    """Three prompts with responses of these lengths."""
    draw = np.random.Generator(np.random.PCG64(seed))
    groups = []
    for many in LENGTHS:
        whole = [np.concatenate([[1, 2], draw.integers(3, 9, n)]) for n in many]
        groups.append(Group.from_sequences([(w, np.arange(len(w)) >= 2) for w in whole], row=0, pairs=()))
    tokens, responses = sum(map(sum, LENGTHS)), sum(map(len, LENGTHS))
    columns = {name: -draw.exponential(size=tokens) for name in ("old_logp_M", "ref_logp_M")}
    return Batch(groups, {**columns, "advantage_N": draw.normal(size=responses)})


def config(**options: Any) -> Any:
    plain = {"clip": 0.2, "clip_high": 0.28, "beta": 0.3, "kl": "loss", "average": None, "max_new_tokens": LONGEST}
    return SimpleNamespace(**{**plain, "temperature": 1.0, **options})


CASES = {
    "grpo": config(loss="grpo", average="rows"),
    "dr grpo": config(loss="grpo", average="constant"),
    "dapo": config(loss="dapo", average="tokens"),
    "gspo": config(loss="gspo"),
    "rloo": config(loss="rloo"),
    "kl in the reward": config(loss="grpo", average="rows", kl="reward"),
}


def slow(c: Any, found: Batch, logp: list[float]) -> float:
    """The loss, response by response and token by token."""
    new, start, total, weight = np.array(logp), 0, 0.0, 0.0
    lengths = [n for many in LENGTHS for n in many]
    for n, length in enumerate(lengths):
        at = slice(start, start + length)
        start += length
        old, ref = (found.columns[name][at] for name in ("old_logp_M", "ref_logp_M"))
        advantage = float(found.columns["advantage_N"][n])

        def clipped(log_ratio: float, a: float = advantage) -> float:
            ratio = np.exp(log_ratio)
            return float(-min(ratio * a, min(max(ratio, 1 - c.clip), 1 + c.clip_high) * a))

        gap = new[at] - ref
        kl = np.exp(-gap) - 1 + gap if c.kl == "loss" else np.zeros(length)
        per_token = np.array([clipped(x) for x in new[at] - old]) + c.beta * kl
        if c.loss == "rloo":
            total += clipped(float((new[at] - old).sum())) + c.beta * kl.sum()
        elif c.loss == "gspo":
            total += clipped(float((new[at] - old).mean())) + c.beta * kl.mean()
        else:
            total += per_token.sum() / {"rows": length, "constant": LONGEST, "tokens": 1}[c.average]
        weight += length if c.average == "tokens" else 1
    return total / weight


def fast(c: Any, found: Batch, logp_M: torch.Tensor, whole: Batch | None = None) -> torch.Tensor:
    objective = PolicyGradient(c, device=torch.device("cpu"))
    values = {"logp_M": logp_M}
    if c.average is None:
        ends = np.cumsum(found.length_N)[:-1].tolist()
        parts = {"logp_N": logp_M, "old_logp_N": torch.tensor(found.columns["old_logp_M"])}
        values |= {name: torch.stack([x.sum() for x in part.tensor_split(ends)]) for name, part in parts.items()}
    return objective(found, values, objective.normaliser(whole or found)).total


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case: str) -> None:
    found = batch()
    near = found.columns["old_logp_M"] + 0.15 * np.sin(np.arange(len(found.columns["old_logp_M"])) * 2.0)
    for logp in (found.columns["old_logp_M"], near):  # before any weight moves, and where some are clipped
        logp_M = torch.tensor(logp, requires_grad=True)
        total = fast(CASES[case], found, logp_M)
        assert float(total.detach()) == pytest.approx(slow(CASES[case], found, logp.tolist()), abs=1e-12)
        if logp is found.columns["old_logp_M"]:
            continue  # min and max of equals have a corner
        total.backward()
        assert logp_M.grad is not None
        for m in range(len(logp)):
            step = np.zeros(len(logp))
            step[m] = 1e-6
            up, down = (slow(CASES[case], found, (logp + sign * step).tolist()) for sign in (1, -1))
            assert float(logp_M.grad[m]) == pytest.approx((up - down) / 2e-6, abs=1e-8), m


@pytest.mark.parametrize("case", CASES)
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(case: str) -> None:
    """-A, by what the mean divides it by; k3 adds nothing where the policy is the reference."""
    c, found = CASES[case], batch()
    found = Batch(found.groups, {**found.columns, "ref_logp_M": found.columns["old_logp_M"]})
    logp_M = torch.tensor(found.columns["old_logp_M"], requires_grad=True)
    fast(c, found, logp_M).backward()
    lengths = np.array([n for many in LENGTHS for n in many])
    divided = {"rows": lengths, "gspo": lengths, "constant": LONGEST, "tokens": 1, "rloo": 1}[c.average or c.loss]
    wanted = -found.columns["advantage_N"] / divided / (lengths.sum() if c.average == "tokens" else len(lengths))
    assert logp_M.grad is not None
    np.testing.assert_allclose(logp_M.grad.numpy(), np.repeat(wanted, lengths), atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_that_is_cut_has_the_same_loss(case: str) -> None:
    whole, c = batch(), CASES[case]
    logp = whole.columns["old_logp_M"] + 0.2
    parts = [whole.select([g]) for g in range(3)]
    ends = np.cumsum([sum(many) for many in LENGTHS])[:-1]
    shares = [float(fast(c, part, torch.tensor(x), whole)) for part, x in zip(parts, np.split(logp, ends), strict=True)]
    assert sum(shares) == pytest.approx(float(fast(c, whole, torch.tensor(logp))), abs=1e-12)


def test_the_upper_clip_is_its_own() -> None:
    """A ratio of 1.25 is inside of 1.28; one of 0.75 is outside of 0.8, where a bad response earns no more."""
    logp, old = torch.tensor([1.25, 1.25, 0.75]).log().double(), torch.zeros(3).double()
    found = policy_loss(logp, old, torch.tensor([1.0, -1.0, -1.0]).double(), 0.2, 0.28)
    assert found.numerator.tolist() == pytest.approx([-1.25, 1.25, 0.8])
    assert found.clipped.tolist() == [0, 0, 1]
    assert policy_loss(logp, old, torch.ones(3).double(), 0.2).numerator.tolist() == pytest.approx([-1.2, -1.2, -0.75])


def test_advantages_and_penalties_by_hand() -> None:
    score, group = torch.tensor([1.0, 3.0, 5.0, 7.0]).double(), torch.tensor([0, 0, 1, 1])
    assert group_relative(score, group, std=False).tolist() == [-1, 1, -1, 1]
    assert group_relative(3 * score, group, std=True).tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-4)
    found = overlong_penalty(torch.tensor([4, 6, 7, 9, 10]), 10, 4)
    assert found.tolist() == [0, 0, -0.25, -0.75, -1]
    loss, length = torch.ones(6).double(), torch.tensor([4, 2])
    for average, total in (("rows", 1.0), ("tokens", 1.0), ("constant", 6 / 8 / 2)):
        numerator = averaged_tokens(loss, length, average, 8).sum()
        assert float(numerator / averaging_weight(length, average)) == pytest.approx(total)
