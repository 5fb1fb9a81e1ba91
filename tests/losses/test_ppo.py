"""The pieces of PPO against slow code that says what it does, on ragged episodes, values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefopt.losses.rl import (
    KlController,
    gae,
    k1,
    k2,
    k3,
    leave_one_out,
    owners,
    per_response,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
    without_end,
)

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def episodes(flat: torch.Tensor, lengths: list[int]) -> list[list[float]]:
    return [part.tolist() for part in flat.split(lengths)]


def same(ours: torch.Tensor, slow: list[Any]) -> None:
    torch.testing.assert_close(ours, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@given(LENGTHS, SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_its_definition(lengths: list[int], seed: int, gamma: float, lam: float) -> None:
    reward, value = drawn(seed, sum(lengths)), drawn(seed + 1, sum(lengths))
    advantage, target = gae(reward, value, torch.tensor(lengths), gamma=gamma, lam=lam)
    slow = []
    for r, v in zip(episodes(reward, lengths), episodes(value, lengths), strict=True):
        v = [*v, 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        slow += [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, len(r))) for t in range(len(r))]
    same(advantage, slow)
    torch.testing.assert_close(target, advantage + value)


@given(LENGTHS, SEEDS)
def test_with_lambda_one_an_advantage_is_what_was_earned_less_what_was_expected(lengths: list[int], seed: int) -> None:
    reward, value = drawn(seed, sum(lengths)), drawn(seed + 1, sum(lengths))
    _, target = gae(reward, value, torch.tensor(lengths), gamma=1.0, lam=1.0)
    same(target, [sum(r[t:]) for r in episodes(reward, lengths) for t in range(len(r))])


@given(LENGTHS, SEEDS)
def test_the_score_comes_with_the_last_token_and_the_penalty_with_every_one(lengths: list[int], seed: int) -> None:
    logp, ref, score = drawn(seed, sum(lengths)), drawn(seed + 1, sum(lengths)), drawn(seed + 2, len(lengths))
    slow = []
    for p, q, s in zip(episodes(logp, lengths), episodes(ref, lengths), score.tolist(), strict=True):
        slow += [-0.3 * (p[t] - q[t]) + (s if t == len(p) - 1 else 0.0) for t in range(len(p))]
    ours = token_rewards(logp, ref, score, torch.tensor(lengths), 0.3)
    same(ours, slow)
    # A response's rewards add up to what RLHF maximises: its score less beta times its log-ratio.
    whole = per_response(ours, torch.tensor(lengths))
    torch.testing.assert_close(whole, score - 0.3 * per_response(logp - ref, torch.tensor(lengths)))


def test_a_response_that_did_not_end_is_punished_as_asked() -> None:
    score, finished = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert without_end(score, finished).tolist() == [2.0, 3.0]
    assert without_end(score, finished, instead=-1.0).tolist() == [2.0, -1.0]
    assert without_end(score, finished, penalty=1.0).tolist() == [2.0, 2.0]


@given(LENGTHS, SEEDS)
def test_whitening_sees_real_tokens_alone(lengths: list[int], seed: int) -> None:
    x = drawn(seed, sum(lengths)) * 3 + 5
    n, numbers = len(x), x.tolist()
    mean = sum(numbers) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in numbers) / n + 1e-8)
    same(whiten(x), [(v - mean) / deviation for v in numbers])
    same(whiten(x, shift_mean=False), [(v - mean) / deviation + mean for v in numbers])


@given(st.lists(st.integers(2, 5), min_size=1, max_size=5), SEEDS)
def test_leave_one_out_compares_with_the_others_of_the_prompt(sizes: list[int], seed: int) -> None:
    value = drawn(seed, sum(sizes))
    slow = []
    for group in episodes(value, sizes):
        slow += [v - sum(group[:i] + group[i + 1 :]) / (len(group) - 1) for i, v in enumerate(group)]
    same(leave_one_out(value, owners(torch.tensor(sizes))), slow)


def test_leave_one_out_needs_others() -> None:
    with pytest.raises(ValueError, match="two responses"):
        leave_one_out(torch.zeros(3), torch.tensor([0, 0, 1]))


def slow_policy(logp: float, old: float, advantage: float, clip: float) -> tuple[float, float, float]:
    """The loss, its derivative with respect to logp, and whether it was clipped."""
    ratio = math.exp(logp - old)
    held = min(max(ratio, 1 - clip), 1 + clip)
    plain, cut = -advantage * ratio, -advantage * held
    return (cut, 0.0, 1.0) if cut > plain else (plain, -advantage * ratio, 0.0)


@given(SEEDS, st.floats(0.05, 0.5))
def test_the_policy_loss_and_its_gradient(seed: int, clip: float) -> None:
    logp = (drawn(seed, 20) * 0.4).requires_grad_()
    old, advantage = drawn(seed + 1, 20) * 0.4, drawn(seed + 2, 20)
    found = policy_loss(logp, old, advantage, clip)
    found.numerator.sum().backward()
    assert logp.grad is not None
    rows = zip(logp.tolist(), old.tolist(), advantage.tolist(), strict=True)
    values, slopes, clipped = zip(*(slow_policy(*row, clip) for row in rows), strict=True)
    same(found.numerator.detach(), list(values))
    same(logp.grad, list(slopes))
    same(found.clipped, list(clipped))


@given(SEEDS)
def test_at_ratio_one_the_gradient_is_the_policy_gradient(seed: int) -> None:
    logp, advantage = drawn(seed, 9).requires_grad_(), drawn(seed + 1, 9)
    policy_loss(logp, logp.detach(), advantage, 0.2).numerator.sum().backward()
    torch.testing.assert_close(logp.grad, -advantage)


@given(SEEDS, st.sampled_from([None, 0.1, 0.5]))
def test_the_value_loss_takes_the_larger_of_two(seed: int, clip: float | None) -> None:
    value, old, target = drawn(seed, 15).requires_grad_(), drawn(seed + 1, 15), drawn(seed + 2, 15)
    found = value_loss(value, old, target, clip)
    found.numerator.sum().backward()
    values, slopes, clipped = [], [], []
    for v, o, r in zip(value.tolist(), old.tolist(), target.tolist(), strict=True):
        near = v if clip is None else min(max(v, o - clip), o + clip)
        larger = (near - r) ** 2 > (v - r) ** 2
        values.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
        slopes.append(0.0 if larger else v - r)  # the clipped branch is larger only where it is flat
        clipped.append(float(larger))
    same(found.numerator.detach(), values)
    same(value.grad, slopes)  # type: ignore[arg-type]
    same(found.clipped, clipped)


def test_estimators_of_the_divergence_on_a_space_that_can_be_summed() -> None:
    p, q = drawn(0, 7).log_softmax(0), drawn(1, 7).log_softmax(0)
    exact = float((p.exp() * (p - q)).sum())
    ratio = p - q
    assert float((p.exp() * k1(ratio)).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((p.exp() * k3(ratio)).sum()) == pytest.approx(exact, rel=1e-12)
    assert (k3(ratio) >= 0).all() and (k2(ratio) >= 0).all() and (k1(ratio) < 0).any()
    near = 1e-3 * ratio
    torch.testing.assert_close(k3(near), k2(near), rtol=1e-3, atol=0)


def test_as_losses_k2_pulls_to_the_reference_k1_nowhere_and_k3_the_other_way() -> None:
    z, q = drawn(2, 6).requires_grad_(), drawn(3, 6).log_softmax(0)

    def slope(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, z)[0]

    def on_policy(estimator: Any) -> torch.Tensor:
        """The expected gradient of an estimator at samples of p, which themselves are not differentiated."""
        p = z.log_softmax(0)
        return slope((p.detach().exp() * estimator(p - q)).sum())

    p = z.log_softmax(0)
    forward = slope((p.exp() * (p - q)).sum())
    p = z.log_softmax(0)
    backward = slope((q.exp() * (q - p)).sum())
    torch.testing.assert_close(on_policy(k2), forward, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(on_policy(k1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(on_policy(k3), backward, rtol=1e-12, atol=1e-14)


@given(st.lists(st.floats(0, 40), min_size=1, max_size=20))
def test_controllers(divergences: list[float]) -> None:
    adaptive: Any = KlController(0.15, target=6.0, horizon=10_000)
    fixed: Any = KlController(0.05)
    beta = 0.15
    for kl in divergences:
        error = max(-0.2, min(0.2, (kl - 6.0) / 6.0))
        beta *= 1 + error * 512 / 10_000
        adaptive, fixed = adaptive.after(kl, 512), fixed.after(kl, 512)
    assert adaptive.coefficient == pytest.approx(beta, rel=1e-12) and fixed.coefficient == 0.05


@pytest.mark.parametrize("whole", [False, True])
def test_a_bandit_s_gradient_is_the_known_one(whole: bool) -> None:
    """The expected gradient of the loss is that of the expected reward, whatever is taken off as a baseline."""
    logits, reward = drawn(5, 3).requires_grad_(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    pi = logits.softmax(0)
    known = -torch.autograd.grad((pi * reward).sum(), logits)[0]
    p, total = logits.detach().softmax(0), torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):  # two draws, so that leave-one-out has something to leave out
            arms, chance = torch.tensor([i, j]), p[i] * p[j]
            length = torch.ones(2, dtype=torch.int64)
            if whole:
                advantage = leave_one_out(reward[arms], torch.zeros(2, dtype=torch.int64))
            else:
                advantage, _ = gae(reward[arms], torch.full((2,), 0.7).double(), length, gamma=1.0, lam=0.95)
            logp = logits.log_softmax(0)[arms]
            loss = policy_loss(logp, logp.detach(), advantage, 0.2).numerator.mean()
            total += chance * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(total, known, rtol=1e-12, atol=1e-14)
