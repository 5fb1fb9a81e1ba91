"""Plackett-Luce against its definition: one response after another, summed over all orders that ties leave open."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses.inputs import mean
from losses.variants import for_each
from prefopt.losses.common import LossOutput
from prefopt.losses.pairs import dpo
from prefopt.losses.ranking import plackett_luce


def run(reward: list[list[float]], tiers: list[list[int]], beta: float = 1.0) -> LossOutput:
    flat = torch.tensor([r for group in reward for r in group], dtype=torch.float64)
    tier = torch.tensor([t for group in tiers for t in group])
    group = torch.tensor([g for g, members in enumerate(tiers) for _ in members])
    return plackett_luce(flat / beta, torch.zeros_like(flat), tier, group, beta=beta)


def one_by_one(reward: list[float], order: tuple[int, ...]) -> float:
    """Probability of drawing the responses in this order."""
    chance, left = 1.0, [math.exp(r) for r in reward]
    for i in order:
        chance *= left[i] / sum(left)
        left[i] = 0.0
    return chance


def over_orders(reward: list[float], tiers: list[int]) -> float:
    """The sum over all orders in which no response comes before one of a better tier."""
    orders = itertools.permutations(range(len(reward)))
    return sum(one_by_one(reward, o) for o in orders if [tiers[i] for i in o] == sorted(tiers))


REWARDS = [0.3, -1.2, 2.0, 0.9, -0.4, 1.1]


@for_each([(2,), (3,), (4,), (5,)])
def test_probabilities_of_all_orders_sum_to_one(k: int) -> None:
    ranks = [[order.index(i) for i in range(k)] for order in itertools.permutations(range(k))]
    output = run([REWARDS[:k]] * len(ranks), ranks)
    assert (-output.numerator_R).exp().sum().item() == pytest.approx(1, rel=1e-13)


@for_each([(tiers,) for k in (2, 3, 4) for tiers in itertools.product(range(3), repeat=k)])
def test_ties_are_the_sum_over_their_orders(tiers: tuple[int, ...]) -> None:
    output = run([REWARDS[: len(tiers)]], [list(tiers)])
    expected = over_orders(REWARDS[: len(tiers)], list(tiers))
    assert math.exp(-output.numerator_R.item()) == pytest.approx(expected, rel=1e-12)
    assert output.weight_R.item() == (len(set(tiers)) > 1)


@pytest.mark.parametrize(
    "tiers", [[0, 0, 0, 0, 1, 1], [1, 0, 0, 2, 0, 0], [0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1, 2]]
)
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_any_number_of_tied_is_exact_in_values_and_gradients(tiers: list[int], scale: float) -> None:
    """Against the sum over all orders, differentiated."""
    values = scale * torch.tensor([*REWARDS, -2.0][: len(tiers)], dtype=torch.float64)
    results = []
    for enumerated in (True, False):
        leaf = values.clone().requires_grad_()
        if enumerated:
            orders = [o for o in itertools.permutations(range(len(tiers))) if [tiers[i] for i in o] == sorted(tiers)]
            ordered = leaf[torch.tensor(orders)]
            loss = -(ordered - ordered.flip(1).logcumsumexp(1).flip(1)).sum(1).logsumexp(0)
        else:
            zero, group = torch.zeros_like(leaf), torch.zeros(len(tiers), dtype=torch.long)
            loss = plackett_luce(leaf, zero, torch.tensor(tiers), group, beta=1.0).numerator_R[0]
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-11)


def test_many_tied_are_exact() -> None:
    """Against inclusion and exclusion: the chance that none of the later ones comes before the last of the tied."""
    reward = torch.linspace(-1, 1.5, 13, dtype=torch.float64)
    e = reward.exp()
    subsets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12)), dtype=torch.float64)
    chance = ((-1) ** subsets.sum(1) * e[12] / (e[12] + subsets @ e[:12])).sum()
    found = run([reward.tolist()], [[0] * 12 + [1]])
    assert found.numerator_R.item() == pytest.approx(-math.log(chance), rel=1e-9)


def test_equal_rewards_count_orders() -> None:
    """Of five tied and one below, all six are first, or last, with the same chance; of 200, one in 201."""
    for tied in (5, 50, 300):
        output = run([[0.3] * (tied + 1)], [[0] * tied + [1]])
        assert output.numerator_R.item() == pytest.approx(math.log(tied + 1), rel=1e-11)


def test_a_best_few_list_is_the_marginal_over_the_others() -> None:
    listed = math.exp(-run([REWARDS[:5]], [[1, 2, 0, 2, 2]]).numerator_R.item())
    rest = itertools.permutations([1, 3, 4])
    assert listed == pytest.approx(sum(one_by_one(REWARDS[:5], (2, 0, *o)) for o in rest), rel=1e-12)


@given(st.lists(st.floats(-300, 300), min_size=4, max_size=4), st.floats(0.01, 3), st.booleans())
def test_two_responses_are_dpo(values: list[float], beta: float, first: bool) -> None:
    policy, reference = torch.tensor(values, dtype=torch.float64).view(2, 2)
    better, worse = (0, 1) if first else (1, 0)
    tier = torch.tensor([better, worse])
    results = []
    for ranked in (True, False):
        leaf = policy.clone().requires_grad_()
        if ranked:
            output = plackett_luce(leaf, reference, tier, torch.tensor([0, 0]), beta=beta)
        else:
            sides = leaf[better, None], leaf[worse, None], reference[better, None], reference[worse, None]
            output = dpo(*sides, beta=beta)
        (gradient,) = torch.autograd.grad(output.numerator_R.sum(), leaf)
        results.append((output.numerator_R, gradient, *output.metrics.values()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


def test_groups_of_any_size_are_independent_and_order_within_them_does_not_matter() -> None:
    rewards = [[0.5, -0.5], [1.0, 2.0, 0.0, -1.0], [0.1, 0.2, 0.3], [1.0, 1.5, -0.3, 0.2, 0.0, 2.2]]
    tiers = [[1, 0], [0, 0, 1, 2], [1, 1, 1], [1, 0, 0, 0, 0, 0]]
    together = run(rewards, tiers)
    for g, (reward, tier) in enumerate(zip(rewards, tiers, strict=True)):
        alone, turned = run([reward], [tier]), run([reward[::-1]], [tier[::-1]])
        for output in (alone, turned):
            torch.testing.assert_close(output.numerator_R[0], together.numerator_R[g])
            assert output.weight_R[0] == together.weight_R[g]
            for key, value in output.metrics.items():
                torch.testing.assert_close(value[0], together.metrics[key][g], equal_nan=True, msg=key)
    assert together.weight_R.tolist() == [1, 1, 0, 1]
    assert together.metrics["rewards/accuracies"].tolist()[:2] == [0.0, 1.0]
    assert together.metrics["rewards/accuracies"][3].item() == pytest.approx(2 / 5)
    assert together.metrics["rewards/margins"][1].item() == pytest.approx(2.5)
    assert together.metrics["rewards/accuracies"].isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiers", [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0]])
def test_extremes_stay_finite(tiers: list[int], dtype: torch.dtype) -> None:
    for values in itertools.product([-1e4, 1e4], repeat=6):
        leaf = torch.tensor(values, dtype=dtype, requires_grad=True)
        zero, group = torch.zeros(6, dtype=dtype), torch.zeros(6, dtype=torch.long)
        output = plackett_luce(leaf, zero, torch.tensor(tiers), group, beta=1.0)
        (gradient,) = torch.autograd.grad(output.numerator_R.sum(), leaf)
        assert output.numerator_R.isfinite().all() and gradient.isfinite().all()
        assert -(1e-3 if dtype == torch.float32 else 1e-12) <= output.numerator_R.item() <= 1.3e5


@pytest.mark.parametrize("tiers", [[0, 1, 2, 3], [0, 0, 1, 2], [1, 0, 0, 0]])
def test_fitting_rankings_recovers_the_rewards_that_made_them(tiers: list[int]) -> None:
    """The loss is a likelihood: over all rankings by their true probability, its minimum is at the truth."""
    truth = REWARDS[:4]
    shapes = sorted(set(itertools.permutations(tiers)))
    chance = torch.tensor([over_orders(truth, list(t)) for t in shapes], dtype=torch.float64)
    assert chance.sum().item() == pytest.approx(1)
    flat = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    tier, group = torch.tensor(shapes).flatten(), torch.arange(len(shapes)).repeat_interleave(4)
    optimiser = torch.optim.LBFGS([flat], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        every = flat.repeat(len(shapes))
        loss = (chance * plackett_luce(every, torch.zeros_like(every), tier, group, beta=1.0).numerator_R).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    found = flat.detach() - flat.detach().mean()
    torch.testing.assert_close(found, torch.tensor(truth, dtype=torch.float64) - sum(truth) / 4, rtol=1e-4, atol=1e-4)


def test_the_loss_is_a_mean_over_groups_that_know_an_order() -> None:
    output = run([[0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0]], [[0, 1], [0, 1, 2], [0, 0]])
    assert mean(output).item() == pytest.approx((math.log(2) + math.log(6)) / 2)
