"""What online methods come to in a world that can be listed: the limit of each, derived here, and reached by training.

A return that is the score less beta times the log-ratio is constant exactly at pi* = ref exp(r / beta) / Z, so that no
response has an advantage there, whatever responses are divided by: RLOO, GRPO and GSPO with KL in the reward stay at
pi*. DPO on pairs of the policy's own, with labels of probability sigma(r1 - r2), has no gradient where beta h = r, at
pi* too. k3 in the loss moves the limit, see :func:`token_limit`. Best-of-K imitates the best of K draws of the policy
that drew. Without KL all mass goes to the best response; a reference that moves takes the optimum beyond pi*.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

import prefopt
from methods import small_world as world
from methods.test_small_world import BETA, distance, logp_of
from prefopt import theory
from prefopt.losses.parse import parse_losses
from prefopt.losses.rl import averaged_tokens, group_relative, k3, owners, per_response, policy_loss
from prefopt.model.load import load_model
from prefopt.model.scorer import Scorer
from prefopt.rl.judgement import Round
from prefopt.rl.lessons import gradient_lesson, preference_lesson
from prefopt.rl.rollouts import Rollouts
from prefopt.train.objective import PreferenceObjective

LENGTHS = torch.tensor([len(y) for y in world.RESPONSES])
MANY = len(world.RESPONSES)


@pytest.fixture(scope="module")
def ref() -> Any:
    """log ref [Y], float64."""
    return logp_of(Scorer(world.model().double()))


@pytest.fixture(scope="module")
def best(ref: Any) -> Any:
    """log pi* [Y]."""
    return theory.optimal_logp(ref, world.REWARD, BETA)


def token_limit(ref: Any, beta: float) -> Any:
    """log pi [Y] where the reward's gradient and that of beta k3, token by token, cancel.

    On samples of pi the gradient of k3 at a prefix is that of KL(ref || pi) of the next token, since E_pi[(1 - ref /
    pi) d log pi] = -sum ref d log pi. With Q the expected score after a token and V its mean, in tabular logits
    pi (Q - V) = beta (pi - ref), so pi = beta ref / (beta + V - Q), and V makes that sum to 1. Prefixes are solved from
    their ends, for Q depends on what comes later alone.
    """
    q = dict(zip(world.RESPONSES, world.REWARD, strict=True))  # by prefix, the value of what was begun
    conditional: dict[tuple[int, ...], float] = {}
    given = {edge: np.exp(logp) for edge, logp in by_edge(ref).items()}
    next_of: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for edge in given:
        next_of[edge[:-1]].append(edge)
    for prefix in sorted(next_of, key=len, reverse=True):
        after = next_of[prefix]
        prior, value = np.array([given[e] for e in after]), np.array([q[e] for e in after])
        gap = lambda v, p=prior, x=value: float((beta * p / (beta + v - x)).sum()) - 1  # noqa: E731
        low = float((value - beta * (1 - prior)).max())  # no token may exceed 1
        v = brentq(gap, low - 1e-12, float(value.max()) + beta, xtol=1e-14)
        found = beta * prior / (beta + v - value)
        conditional |= dict(zip(after, found, strict=True))
        q[prefix] = float((found * value).sum())
    return np.array([sum(np.log(conditional[y[: t + 1]]) for t in range(len(y))) for y in world.RESPONSES])


def by_edge(logp: Any) -> dict[tuple[int, ...], float]:
    """The log-probability of each token that may come, given what stands before it."""
    listed = [y[: t + 1] for y in world.RESPONSES for t in range(len(y))]
    return dict(zip(listed, world.conditionals(logp), strict=True))


def best_of(k: int, logp: Any, reward: Any) -> Any:
    """log-probability [Y] of the best of ``k`` draws from exp(logp), the first of equals: F(r)^k - F(r-)^k of the mass
    up to and below a response's reward, in proportion to probability among equals."""
    p, worth = np.exp(logp), reward.round(9)
    upto = np.array([p[worth <= r].sum() for r in worth])
    below = np.array([p[worth < r].sum() for r in worth])
    return np.log(p / (upto - below) * (upto**k - below**k))


# -- at the limit nothing is left to learn ---------------------------------------------------------------------------


def listed(logp: Any, ref: Any) -> Round:
    """Every response once, as if it had been drawn."""
    logp_M, ref_M = (torch.tensor(world.conditionals(x)) for x in (logp, ref))
    finished = torch.tensor([y[-1] == world.STOP for y in world.RESPONSES])
    return Round(Rollouts((world.group(),), logp_M, ref_M, logp_M, None, torch.tensor(world.REWARD), finished))


def options(**more: Any) -> Any:
    plain = {"overlong_buffer": None, "dynamic_sampling": False, "kl": "reward", "beta": BETA, "advantage_std": False}
    plain |= {
        "importance_cap": None,
        "average": None,
        "labels": "soft",
        "pairs": "all",
        "desirable_above": None,
        "max_new_tokens": world.LONGEST,
    }
    return SimpleNamespace(**{**plain, **more})


@pytest.mark.parametrize("loss", ["rloo", "grpo", "gspo"])
def test_at_the_optimum_no_response_has_an_advantage(loss: str, ref: Any, best: Any) -> None:
    batch = gradient_lesson(options(loss=loss), listed(best, ref)).batch
    np.testing.assert_allclose(batch.columns["advantage_N"], 0, atol=1e-9)
    away = gradient_lesson(options(loss=loss), listed(ref, ref)).batch
    assert np.abs(away.columns["advantage_N"]).max() > 0.3


def test_at_the_optimum_dpo_on_own_pairs_has_no_gradient(ref: Any, best: Any) -> None:
    """Pair by pair, so whatever the policy draws; hard labels have one, and there is one elsewhere."""

    def slope(logp: Any, labels: str) -> float:
        terms = parse_losses("dpo", beta=BETA)
        some = np.random.Generator(np.random.PCG64(0)).choice(MANY, 24, replace=False)
        group = world.group()
        few = type(group)(group.prefix, tuple(group.continuations[k] for k in some), 0, ())
        ends = np.cumsum(LENGTHS.numpy())[:-1]
        logp_M, ref_M = (
            torch.tensor(np.concatenate([np.split(world.conditionals(x), ends)[k] for k in some])) for x in (logp, ref)
        )
        score = torch.tensor(world.REWARD[some])
        rollouts = Rollouts((few,), logp_M, ref_M, logp_M, None, score, torch.ones(24, dtype=torch.bool))
        batch = preference_lesson(options(loss="dpo", labels=labels), terms, Round(rollouts)).batch
        objective = PreferenceObjective(terms, device=torch.device("cpu"))
        values = {"logp_N": torch.tensor(logp[some], requires_grad=True)}
        objective(batch, values, objective.normaliser(batch)).total.backward()
        assert values["logp_N"].grad is not None
        return float(values["logp_N"].grad.abs().max())

    assert slope(best, "soft") < 1e-9
    assert slope(best, "hard") > 1e-3 and slope(ref, "soft") > 1e-3


def tabular(logp: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [E] of all edges, and from them the log-probabilities [M] of tokens, differentiably."""
    known = by_edge(logp)
    place = {edge: n for n, edge in enumerate(known)}
    prefixes = {prefix: n for n, prefix in enumerate(dict.fromkeys(edge[:-1] for edge in known))}
    logits = torch.tensor([*known.values()], requires_grad=True)
    owner = torch.tensor([prefixes[edge[:-1]] for edge in known])
    total = torch.zeros(len(prefixes), dtype=torch.float64).index_add(0, owner, logits.exp()).log()
    return logits, (logits - total[owner])[[place[y[: t + 1]] for y in world.RESPONSES for t in range(len(y))]]


@pytest.mark.parametrize("average", ["constant", "rows"])
def test_k3_in_the_loss_has_its_own_limit(average: str, ref: Any, best: Any) -> None:
    """The expected gradient of GRPO's loss in tabular logits is zero there with sums over tokens, not with means of
    each response, which weigh tokens by the length that is still to come; nor is it at pi*."""
    limit = token_limit(ref, BETA)
    assert np.exp(limit).sum() == pytest.approx(1, abs=1e-9)
    assert 0.05 < theory.total_variation(limit, best) < 0.5

    def slope(logp: Any) -> float:
        logits, logp_M = tabular(logp)
        p, reward = torch.tensor(np.exp(logp)), torch.tensor(world.REWARD)
        advantage = reward - (p * reward).sum()
        old_M, ref_M = logp_M.detach(), torch.tensor(world.conditionals(ref))
        loss_M = policy_loss(logp_M, old_M, advantage[owners(LENGTHS)], 0.2).numerator + BETA * k3(logp_M - ref_M)
        loss_N = per_response(averaged_tokens(loss_M, LENGTHS, average, world.LONGEST), LENGTHS)
        (found,) = torch.autograd.grad((p * loss_N).sum(), [logits])
        return float(found.abs().max())

    if average == "constant":
        assert slope(limit) < 1e-9
    else:
        assert slope(limit) > 1e-4
    assert slope(best) > 1e-3


def test_the_deviation_of_a_group_leaves_rounding_alone() -> None:
    same = torch.tensor([0.3, 0.3 + 1e-9, 0.3, 1.0, 2.0, 3.0]).double()
    group_N = torch.tensor([0, 0, 0, 1, 1, 1])
    found = group_relative(same, group_N, std=True)
    assert found[:3].abs().max() < 1e-4
    assert found[3:].tolist() == pytest.approx([-1.2247, 0, 1.2247], abs=1e-3)


# -- what is reached by training ------------------------------------------------------------------------------------


def train(folder: Path, **options: Any) -> Any:
    """log pi [Y] after a run on the one prompt."""
    given: dict[str, Any] = {"num": 256, "batch_size": 1, "epochs": 120, "learning_rate": 3e-3, "seed": 0}
    result = prefopt.online(
        world.write_world(folder / "m"),
        [{"prompt": world.PROMPT}],
        reward=world.reward,
        output=folder / "out",
        max_new_tokens=world.LONGEST,
        token_budget=8192,
        device="cpu",
        dtype="float32",
        threads=1,
        progress="none",
        **{**given, **options},
    )
    assert result is not None
    return logp_of(Scorer(load_model(str(folder / "out"), dtype=torch.float64, device=torch.device("cpu"))))


EXACT: dict[str, Any] = {"kl": "reward", "beta": BETA, "advantage_std": False}
REACHED: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "grpo", **EXACT, "average": "constant", "num": 192, "learning_rate": 2e-3},
    "gspo": {"loss": "gspo", **EXACT, "num": 160},
    "dpo": {"loss": "dpo", "beta": BETA, "labels": "soft", "num": 128, "learning_rate": 2e-3},
}
"""RLOO is that of ``prefopt ppo``, see test_small_world.py."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REACHED)
def test_regularised_methods_reach_the_optimum(name: str, ref: Any, best: Any, tmp_path: Path) -> None:
    found = train(tmp_path, **REACHED[name])
    assert theory.total_variation(ref, best) > 0.3
    assert distance(found, best, name) <= 0.05


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_grpo_with_its_own_kl_reaches_its_own_limit(ref: Any, best: Any, tmp_path: Path) -> None:
    limit = token_limit(ref, BETA)
    found = train(tmp_path, loss="grpo", beta=BETA, advantage_std=False, average="constant")
    assert distance(found, limit, "grpo, k3 in the loss") <= 0.05
    assert theory.total_variation(found, best) > theory.total_variation(found, limit)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_best_of_k_is_imitated(ref: Any, tmp_path: Path) -> None:
    """One round, so that all samples are the reference's: many prompts of the same text, each with K draws."""
    limit = best_of(2, ref, world.REWARD)
    assert np.exp(limit).sum() == pytest.approx(1)
    prompts = [{"prompt": world.PROMPT}] * 12_000
    result = prefopt.online(
        world.write_world(tmp_path / "m"),
        prompts,
        reward=world.reward,
        output=tmp_path / "out",
        loss="best_of_k",
        num=2,
        batch_size=12_000,
        passes=5,
        minibatches=30,
        learning_rate=1e-3,
        max_new_tokens=world.LONGEST,
        token_budget=8192,
        device="cpu",
        dtype="float32",
        threads=1,
        progress="none",
    )
    assert result is not None and result.steps == 1
    found = logp_of(Scorer(load_model(str(tmp_path / "out"), dtype=torch.float64, device=torch.device("cpu"))))
    assert theory.total_variation(ref, limit) > 0.19
    assert distance(found, limit, "best of 2") <= 0.05


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_kl_the_best_response_takes_it_all(ref: Any, tmp_path: Path) -> None:
    found = train(tmp_path, loss="dapo", num=32, epochs=60)
    top = int(np.argmax(world.REWARD))
    print(f"\ndapo without KL: {np.exp(found[top]):.3f} on the best response, which had {np.exp(ref[top]):.4f}")
    assert theory.expected(found, world.REWARD) > theory.expected(ref, world.REWARD) + 0.5 * (
        world.REWARD.max() - theory.expected(ref, world.REWARD)
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_reference_that_moves_goes_beyond_the_optimum(ref: Any, best: Any, tmp_path: Path) -> None:
    """Each time it has moved the optimum is that of the new reference, ref exp(n r / beta) of the first: more reward,
    at more KL, than pi* has."""
    found = train(tmp_path, loss="dpo", beta=BETA, labels="soft", num=32, epochs=60, ref_model_sync_steps=10)
    ours, theirs = (float(theory.expected(x, world.REWARD)) for x in (found, best))
    print(f"\ndpo, moving reference: reward {ours:.3f}, pi* {theirs:.3f}")
    assert ours > theirs + 0.05 and theory.kl(found, ref) > theory.kl(best, ref)
