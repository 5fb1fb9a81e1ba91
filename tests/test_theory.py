"""The derivation of DPO, identity by identity, to 1e-12; gradients against automatic differentiation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_expit

from prefopt import theory
from prefopt.losses.pairs import dpo, ipo
from prefopt.losses.ranking import plackett_luce as ranking_loss

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def world(seed: int, prompts: int = 3, many: int = 6) -> tuple[Any, Any, float]:
    """A reference [prompts, Y], a reward of the same shape, and beta."""
    chance = np.random.Generator(np.random.PCG64(seed))
    ref = theory.normalised(chance.normal(size=(prompts, many)))
    return ref, chance.normal(size=(prompts, many)), float(chance.uniform(0.2, 2.0))


SEEDS = st.integers(0, 2**32 - 1)


def test_every_response_is_listed_once_and_their_probabilities_add_up() -> None:
    found = theory.responses(4, 3, stop=2)
    assert len(found) == len(set(found)) == 1 + 3 + 9 * 4
    chance = np.random.Generator(np.random.PCG64(0))
    tables = {
        start: theory.normalised(chance.normal(size=4))
        for n in range(3)
        for start in itertools.product(range(4), repeat=n)
    }
    logp = [sum(tables[y[:t]][y[t]] for t in range(len(y))) for y in found]
    np.testing.assert_allclose(np.exp(logp).sum(), 1, **CLOSE)


@given(SEEDS)
def test_the_optimum_is_a_distribution_and_nothing_is_better(seed: int) -> None:
    ref, reward, beta = world(seed)
    best = theory.optimal_logp(ref, reward, beta)
    np.testing.assert_allclose(np.exp(best).sum(-1), 1, **CLOSE)
    value = theory.objective(best, ref, reward, beta)
    # The value of the optimum is beta log Z, and every other policy loses beta KL(pi || pi*).
    np.testing.assert_allclose(value, beta * theory.log_partition(ref, reward, beta)[:, 0], **CLOSE)
    other = theory.normalised(np.random.Generator(np.random.PCG64(seed + 1)).normal(size=ref.shape))
    lost = value - theory.objective(other, ref, reward, beta)
    np.testing.assert_allclose(lost, beta * theory.kl(other, best), **CLOSE)
    assert (lost >= 0).all()


@given(SEEDS)
def test_the_reward_comes_back_from_its_policy(seed: int) -> None:
    ref, reward, beta = world(seed)
    best, log_z = theory.optimal_logp(ref, reward, beta), theory.log_partition(ref, reward, beta)
    np.testing.assert_allclose(theory.implied_reward(best, ref, beta, log_z), reward, **CLOSE)


@given(SEEDS)
def test_log_z_cancels_in_preferences(seed: int) -> None:
    ref, reward, beta = world(seed)
    implied = theory.implied_reward(theory.optimal_logp(ref, reward, beta), ref, beta)
    np.testing.assert_allclose(theory.bradley_terry(implied), theory.bradley_terry(reward), **CLOSE)


@given(SEEDS, st.floats(-50, 50))
def test_rewards_of_one_class_have_one_optimum_and_one_representative(seed: int, shift: float) -> None:
    ref, reward, beta = world(seed)
    other = reward + shift * np.arange(1, 4)[:, None]
    assert theory.same_class(reward, other, 1e-11)
    assert not theory.same_class(reward, other + np.eye(3, 6))
    one, two = (theory.optimal_logp(ref, r, beta) for r in (reward, other))
    np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-11)
    kept = theory.representative(reward, ref, beta)
    np.testing.assert_allclose(theory.log_partition(ref, kept, beta), 0, atol=1e-12)
    np.testing.assert_allclose(theory.implied_reward(one, ref, beta), kept, **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_choices_by_strengths_by_rewards_and_by_the_sigmoid_are_one(seed: int) -> None:
    """p_i / (p_i + p_j) with p = exp r, and log(e^a / (e^a + e^b)) = log(1 / (1 + e^(b - a))) = log sigma(a - b)."""
    reward = np.random.default_rng(seed).normal(0, 2, 5)
    strength = np.exp(reward)
    shares = strength[:, None] / (strength[:, None] + strength[None, :])
    np.testing.assert_allclose(theory.bradley_terry(reward), shares, **CLOSE)
    difference = reward[:, None] - reward[None, :]
    np.testing.assert_allclose(np.log(shares), np.log(1 / (1 + np.exp(-difference))), **CLOSE)
    np.testing.assert_allclose(np.log(shares), log_expit(difference), **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_a_reward_models_loss_is_the_likelihood_of_the_choices_and_dpos_with_the_policys_reward(seed: int) -> None:
    """Over a data set of one prompt's pairs, one by one."""
    rng = np.random.default_rng(seed)
    reward, (logp, ref) = rng.normal(0, 2, 5), (theory.normalised(rng.normal(0, 1, 5)) for _ in range(2))
    pairs = [tuple(rng.choice(5, 2, replace=False)) for _ in range(200)]
    weight = np.zeros((5, 5))
    for chosen, rejected in pairs:
        weight[chosen, rejected] += 1 / len(pairs)
    e = np.exp(reward)
    each = [-math.log(e[chosen] / (e[chosen] + e[rejected])) for chosen, rejected in pairs]
    assert theory.reward_model_loss(reward, weight) == pytest.approx(np.mean(each), rel=1e-12)
    own = 0.3 * (logp - ref)
    assert theory.dpo_loss(logp, ref, weight, 0.3) == pytest.approx(theory.reward_model_loss(own, weight), rel=1e-14)
    with_z = theory.implied_reward(logp, ref, 0.3, log_z=1.7)
    assert theory.reward_model_loss(with_z, weight) == pytest.approx(theory.reward_model_loss(own, weight), rel=1e-12)


@given(SEEDS)
def test_dpo_is_stationary_at_the_optimum_and_its_gradient_is_that_of_the_paper(seed: int) -> None:
    ref, reward, beta = world(seed, prompts=1)
    ref, reward = ref[0], reward[0]
    weight = theory.pair_weights(theory.bradley_terry(reward), np.exp(ref))
    best = theory.optimal_logp(ref, reward, beta)
    np.testing.assert_allclose(theory.dpo_gradient(best, ref, weight, beta), 0, atol=1e-12)
    elsewhere = theory.normalised(np.arange(6.0))
    logits = torch.tensor(elsewhere, requires_grad=True)
    h = beta * (logits.log_softmax(-1) - torch.tensor(ref))
    loss = -(torch.tensor(weight) * torch.nn.functional.logsigmoid(h[:, None] - h[None, :])).sum()
    loss.backward()
    np.testing.assert_allclose(theory.dpo_loss(elsewhere, ref, weight, beta), loss.item(), **CLOSE)
    ours = theory.through_softmax(theory.dpo_gradient(elsewhere, ref, weight, beta), elsewhere)
    np.testing.assert_allclose(ours, logits.grad, **CLOSE)
    assert theory.dpo_loss(best, ref, weight, beta) <= theory.dpo_loss(elsewhere, ref, weight, beta)


@given(SEEDS)
def test_plackett_luce_is_a_distribution_over_orders_and_bradley_terry_for_two(seed: int) -> None:
    _, reward, beta = world(seed, prompts=1, many=4)
    orders = list(itertools.permutations(range(4)))
    logp = [theory.plackett_luce(reward[0], order) for order in orders]
    np.testing.assert_allclose(np.exp(logp).sum(), 1, **CLOSE)
    # The chance that i comes before j is Bradley-Terry's, whoever else is ranked.
    for i, j in itertools.permutations(range(4), 2):
        before = sum(np.exp(p) for p, order in zip(logp, orders, strict=True) if order.index(i) < order.index(j))
        np.testing.assert_allclose(before, theory.bradley_terry(reward[0])[i, j], **CLOSE)
    shifted = theory.plackett_luce(reward[0] + 7 * beta, orders[5])
    np.testing.assert_allclose(shifted, logp[5], rtol=1e-11)


@given(SEEDS)
def test_the_losses_that_train_are_these(seed: int) -> None:
    ref, reward, beta = world(seed, prompts=1, many=4)
    logp, order = theory.normalised(reward[0]), (2, 0, 3, 1)
    pi, base = torch.tensor(logp), torch.tensor(ref[0])
    implied = theory.implied_reward(logp, ref[0], beta)
    tier, group = torch.tensor([order.index(y) for y in range(4)]), torch.zeros(4, dtype=torch.int64)
    found = ranking_loss(pi, base, tier, group, beta=beta)
    np.testing.assert_allclose(found.numerator_R, [-theory.plackett_luce(implied, order)], **CLOSE)
    one = np.zeros((4, 4))
    one[1, 3] = 1.0
    sides = (pi[1:2], pi[3:4], base[1:2], base[3:4])
    np.testing.assert_allclose(dpo(*sides, beta=beta).numerator_R, [theory.dpo_loss(logp, ref[0], one, beta)], **CLOSE)
    length = torch.ones(1)
    squared = ipo(*sides, length, length, beta=beta).numerator_R
    np.testing.assert_allclose(squared, [theory.ipo_loss(logp, ref[0], one, beta)], **CLOSE)


@given(SEEDS)
def test_ipo_s_optimum_minimises_its_loss(seed: int) -> None:
    ref, reward, tau = world(seed, prompts=1)
    ref, preference = ref[0], theory.bradley_terry(reward[0])
    drawn = np.exp(theory.normalised(np.arange(6.0) / 3))
    best = theory.ipo_optimum(preference, drawn, ref, tau)
    h = torch.tensor(best, requires_grad=True)
    gap = h - torch.tensor(ref)
    weight = torch.tensor(theory.pair_weights(preference, drawn))
    loss = (weight * (gap[:, None] - gap[None, :] - 0.5 / tau) ** 2).sum()
    np.testing.assert_allclose(theory.ipo_loss(best, ref, weight.numpy(), tau), loss.item(), **CLOSE)
    loss.backward()
    np.testing.assert_allclose(h.grad, 0, atol=1e-12)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_under_deterministic_labels_ipo_stays_and_dpo_runs_away(tau: float) -> None:
    ref = theory.normalised([0.3, -0.2])
    sure = np.array([[0.5, 1.0], [0.0, 0.5]])  # the first always beats the second
    best = theory.ipo_optimum(sure, [0.5, 0.5], ref, tau)
    ratio = best - ref
    np.testing.assert_allclose(ratio[0] - ratio[1], 0.5 / tau, **CLOSE)
    weight = np.array([[0.0, 1.0], [0.0, 0.0]])
    losses = [theory.dpo_loss(theory.normalised([z, 0.0]), ref, weight, tau) for z in (1.0, 10.0, 100.0)]
    assert losses[0] > losses[1] > losses[2]  # no log-ratio is large enough for it
    far = theory.normalised([20 / tau, 0.0])
    assert theory.dpo_loss(far, ref, weight, tau) < 1e-8 < theory.ipo_loss(far, ref, weight, tau)
