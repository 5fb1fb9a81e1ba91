"""A world that can be listed: what is trained comes to the optimum pi* = ref exp(r / beta) / Z that theory.py gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import prefopt
from methods import small_world as world
from prefopt import theory
from prefopt.data.audit.rows import CONTRADICTION, AuditOptions, audit
from prefopt.losses.pairs import dpo
from prefopt.losses.rl import bradley_terry, policy_loss
from prefopt.model.load import load_model
from prefopt.model.packing import pack
from prefopt.model.scalar import ScalarScorer, scalar_from
from prefopt.model.scorer import Scorer, response_sums
from prefopt.rl.objective import Targets, targets_of
from prefopt.rl.rollouts import Rollouts
from prefopt.runs.diagnose import diagnose
from prefopt.runs.findings import Finding
from prefopt.runs.history import read_history
from prefopt.train import checkpoint
from train.small import write_rows

BETA = 0.5
MANY = len(world.RESPONSES)
FIRST, SECOND = torch.triu_indices(MANY, MANY, 1)


def logp_of(scorer: Scorer) -> Any:
    with torch.no_grad():
        return world.distribution(scorer).numpy()


@pytest.fixture(scope="module")
def ref() -> Any:
    """log ref [Y], float64."""
    found = logp_of(Scorer(world.model().double()))
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-6)
    return found


@pytest.fixture(scope="module")
def best(ref: Any) -> Any:
    """log pi* [Y]; there is something to learn."""
    found = theory.optimal_logp(ref, world.REWARD, BETA)
    assert theory.total_variation(ref, found) > 0.3
    return found


def distance(found: Any, best: Any, what: str) -> float:
    """Total variation from the optimum; also printed, for whoever runs this with -s."""
    far = float(theory.total_variation(found, best))
    print(f"\n{what}: total variation {far:.4f} from the optimum")
    return far


# -- what PPO and RLOO aim at, without sampling ---------------------------------------------------------------------


def listed(logp: Any, ref: Any, value_M: torch.Tensor | None) -> Rollouts:
    """Every response once, as if it had been drawn."""
    logp_M, ref_M = (torch.tensor(world.conditionals(x)) for x in (logp, ref))
    finished = torch.tensor([y[-1] == world.STOP for y in world.RESPONSES])
    return Rollouts((world.group(),), logp_M, ref_M, logp_M, value_M, torch.tensor(world.REWARD), finished)


def targets(algorithm: str, rollouts: Rollouts, lam: float = 1.0) -> Targets:
    config: Any = SimpleNamespace(
        algorithm=algorithm,
        whiten_advantages=False,
        whiten_rewards=False,
        gamma=1.0,
        gae_lambda=lam,
        missing_eos_penalty=None,
        missing_eos_score=None,
    )
    return targets_of(config, rollouts, BETA)


def earned(logp: Any, ref: Any) -> Any:
    """What each token [M] earns: less beta times its log-ratio, and with the last one the reward."""
    found = -BETA * (world.conditionals(logp) - world.conditionals(ref))
    found[np.cumsum([len(y) for y in world.RESPONSES]) - 1] += world.REWARD
    return found


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_at_the_optimum_no_token_has_an_advantage(lam: float, ref: Any, best: Any) -> None:
    value_M = torch.tensor(world.to_come(best, earned(best, ref)))
    found = targets("ppo", listed(best, ref, value_M), lam)
    torch.testing.assert_close(found.advantage, torch.zeros_like(value_M), rtol=0, atol=1e-9)


def test_at_the_optimum_no_response_is_better_than_the_others(ref: Any, best: Any) -> None:
    found = targets("rloo", listed(best, ref, None))
    torch.testing.assert_close(found.advantage, torch.zeros(MANY).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("critic", ["ignorant", "wrong", "perfect"])
def test_the_expected_policy_gradient_is_that_of_the_objective(critic: str, ref: Any) -> None:
    """Away from the optimum; with lambda 1 whatever the critic says of a state, with less where it is right."""
    scorer = Scorer(world.model(seed=3).double())
    logp = world.distribution(scorer)
    objective = (logp.exp() * (torch.tensor(world.REWARD) - BETA * (logp - torch.tensor(ref)))).sum()
    parameters = list(scorer.parameters())
    expected = torch.autograd.grad(objective, parameters, retain_graph=True)
    here = logp.detach().numpy()
    value_M = np.zeros(len(world.conditionals(ref)))
    if critic != "ignorant":
        noise = 0.0 if critic == "perfect" else np.random.Generator(np.random.PCG64(0)).normal(size=len(value_M))
        value_M = world.to_come(here, earned(here, ref) + noise)
    lam = 0.3 if critic == "perfect" else 1.0
    advantage = targets("ppo", listed(here, ref, torch.tensor(value_M)), lam).advantage
    batch = pack([world.group()], scorer.layout)
    logp_M = scorer(batch)
    loss_M = policy_loss(logp_M, logp_M.detach(), advantage, 0.2).numerator
    found = torch.autograd.grad(-(logp.detach().exp()[batch.owner] * loss_M).sum(), parameters)
    off = sum(float((ours - wanted).square().sum()) for ours, wanted in zip(found, expected, strict=True))
    assert off**0.5 < 1e-5 * sum(float(wanted.square().sum()) for wanted in expected) ** 0.5


# -- what is reached by training ------------------------------------------------------------------------------------


def descend(model: torch.nn.Module, loss: Any, *, steps: int, warm: int = 20) -> None:
    """Adam on the loss of all that can be listed, the rate falling to zero."""
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warm) * (1 - i / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def fit_dpo(count: torch.Tensor, label: torch.Tensor, ref: Any) -> Any:
    """DPO by this package's loss; log pi [Y] at the end.

    ``count`` and ``label``, [pairs]: how often each pair i < j was compared, and the part that the first one won.
    """
    scorer, base = Scorer(world.model()), torch.tensor(ref)
    batch = pack([world.group()], scorer.layout)

    def loss() -> torch.Tensor:
        logp = response_sums(scorer(batch), batch)
        found = dpo(logp[FIRST], logp[SECOND], base[FIRST], base[SECOND], label, beta=BETA)
        return (found.numerator_R * count).sum() / count.sum()

    descend(scorer, loss, steps=450)
    return logp_of(scorer)


@pytest.mark.slow
def test_dpo_on_soft_labels_reaches_the_optimum(ref: Any, best: Any) -> None:
    label = torch.tensor(theory.bradley_terry(world.REWARD)[FIRST, SECOND])
    assert distance(fit_dpo(torch.ones(len(FIRST)).double(), label, ref), best, "DPO, soft labels") <= 0.02


@pytest.mark.slow
def test_dpo_on_sampled_labels_comes_nearer_with_their_number(ref: Any, best: Any) -> None:
    chance, prefer = np.random.Generator(np.random.PCG64(0)), theory.bradley_terry(world.REWARD)
    errors = []
    for many in (10_000, 3_000_000):  # labels of pairs drawn at random
        count = chance.multinomial(many, np.full(len(FIRST), 1 / len(FIRST)))
        wins = chance.binomial(count, prefer[FIRST, SECOND])
        label = torch.tensor(wins / np.maximum(count, 1))
        found = fit_dpo(torch.tensor(count).double(), label, ref)
        errors.append(distance(found, best, f"DPO, {many:,} sampled labels"))
    assert errors[1] < 0.5 * errors[0] and errors[1] <= 0.03


@pytest.mark.slow
def test_a_reward_model_recovers_differences_of_the_reward() -> None:
    label = torch.tensor(theory.bradley_terry(world.REWARD)[FIRST, SECOND])
    scorer = ScalarScorer(scalar_from(world.model(), world.tokenizer(), seed=1))
    batch = pack([world.group()], scorer.layout)

    def loss() -> torch.Tensor:
        reward = scorer(batch)
        return bradley_terry(reward[FIRST], reward[SECOND], label).mean()

    descend(scorer, loss, steps=300)
    with torch.no_grad():
        found = scorer(batch).double().numpy()
    gap = (found - found.mean()) - (world.REWARD - world.REWARD.mean())
    print(f"\nreward model: differences off by {gap.std():.4f}, of a reward that varies by {world.REWARD.std():.3f}")
    assert gap.std() < 0.08 * world.REWARD.std()


FITTED: dict[str, Any] = {"beta": BETA, "learning_rate": 3e-3, "batch_size": 1, "token_budget": 1536, "device": "cpu"}
FITTED |= {"dtype": "float32", "threads": 1, "progress": "none"}


def fitted(folder: Path, ref: Any, labels: int | None, *, steps: int) -> tuple[Any, Any, list[Finding]]:
    """DPO by its command: log pi [Y] as saved and after the last step, and what the run says without the truth."""
    start = world.write_world(folder / "m")
    held_out = write_rows(folder / "held_out.jsonl", world.pairs(ref, 500, seed=1))
    each: dict[str, Any] = {"epochs": float(steps), "save_every": steps, "eval_every": 10, "eval_data": [held_out]}
    prefopt.dpo(start, [world.labelled(ref, labels, seed=0)], output=folder / "out", **each, **FITTED)
    last = load_model(start, dtype=torch.float64, device=torch.device("cpu"))
    last.load_state_dict(dict(checkpoint.part_of("policy", checkpoint.at(folder / "out/checkpoints", steps).weights)))
    saved = load_model(str(folder / "out"), dtype=torch.float64, device=torch.device("cpu"))
    return logp_of(Scorer(saved)), logp_of(Scorer(last)), diagnose(read_history(folder / "out"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dpo_on_few_labels_ends_below_its_reference_and_says_so_without_the_truth(
    ref: Any, best: Any, tmp_path: Path
) -> None:
    """3,200 labels, learned by heart: held-out accuracy does not show it, the held-out loss does. The weights that are
    saved are better than the reference."""
    saved, last, found = fitted(tmp_path, ref, 3_200, steps=150)
    start, kept, end = (float(theory.objective(x, ref, world.REWARD, BETA)) for x in (ref, saved, last))
    assert end < start < kept, (start, kept, end)
    assert distance(last, best, "DPO, 3,200 labels, at the end") > distance(ref, best, "reference")
    to_look_at = {finding.name: finding.text for finding in found if finding.look}
    assert "The weights of step" in to_look_at["over-trained"] and "chosen fell far" in to_look_at
    accuracies = read_history(tmp_path / "out").curve("rewards/accuracies", held_out=True).values
    assert accuracies[-1] > 0.55, "no alarm for whoever looks at accuracies alone"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dpo_on_exact_labels_raises_no_such_alarm(ref: Any, best: Any, tmp_path: Path) -> None:
    saved, last, found = fitted(tmp_path, ref, None, steps=80)
    assert distance(saved, best, "DPO, exact labels, 80 steps") < 0.1
    assert theory.objective(last, ref, world.REWARD, BETA) > theory.objective(ref, ref, world.REWARD, BETA)
    assert not {"over-trained", "never better"} & {finding.name for finding in found}


@pytest.mark.slow
def test_few_labels_contradict_one_another_which_the_check_of_data_counts(ref: Any, tmp_path: Path) -> None:
    rows = world.pairs(ref, 3_200, seed=0)
    found = audit([write_rows(tmp_path / "rows.jsonl", rows)], AuditOptions())
    (issue,) = [one for one in found.issues("warning") if one.kind == CONTRADICTION]
    sides: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        best, _, _ = row["votes"][0]
        sides.setdefault(tuple(sorted(row["responses"])), set()).add(row["responses"][best])
    opposite = sum(len(sides[tuple(sorted(row["responses"]))]) == 2 for row in rows)
    print(
        f"\n{len(issue.rows)} rows contradict an earlier one; {opposite} of {len(rows)} are of pairs with both labels"
    )
    assert 0 < len(issue.rows) <= opposite and opposite > 1_000


ROADS: dict[str, dict[str, Any]] = {
    "ppo": {"gae_lambda": 1.0, "value_clip": 10.0, "critic_learning_rate": 5e-3, "learning_rate": 2e-3},
    "rloo": {"learning_rate": 3e-3},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", ROADS)
def test_reinforcement_learning_reaches_the_optimum(algorithm: str, ref: Any, best: Any, tmp_path: Path) -> None:
    """Advantages are not whitened: they vanish as the optimum comes near, and with them what sampling adds to the
    gradient, which whitening would bring back to its first size in every step."""
    result = prefopt.ppo(
        world.write_world(tmp_path / "m"),
        [{"prompt": world.PROMPT}],
        reward=world.reward,
        output=tmp_path / "out",
        algorithm=algorithm,
        beta=BETA,
        num=256,
        batch_size=1,
        epochs=120,
        max_new_tokens=world.LONGEST,
        whiten_advantages=False,
        token_budget=8192,
        device="cpu",
        dtype="float32",
        threads=1,
        progress="none",
        **ROADS[algorithm],
    )
    assert result is not None
    found = logp_of(Scorer(load_model(str(tmp_path / "out"), dtype=torch.float64, device=torch.device("cpu"))))
    first = float(theory.total_variation(ref, best))
    reached = distance(found, best, f"{algorithm}, which began at {first:.4f}")
    assert first > 0.3 and reached <= 0.05
    assert theory.objective(best, ref, world.REWARD, BETA) - theory.objective(found, ref, world.REWARD, BETA) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_options_that_nobody_gave_reach_most_of_what_can_be_gained(ref: Any, best: Any, tmp_path: Path) -> None:
    """RLOO with 6,400 samples; at the rate of large models it reaches 40 % (benchmarks/world_table.py)."""
    prompts = [{"prompt": world.PROMPT}] * 16
    options: dict[str, Any] = {"batch_size": 16, "epochs": 100, "max_new_tokens": world.LONGEST, "token_budget": 8192}
    options |= {"beta": BETA, "device": "cpu", "dtype": "float32", "threads": 1, "progress": "none"}
    start = world.write_world(tmp_path / "m")
    prefopt.ppo(start, prompts, reward=world.reward, output=tmp_path / "out", algorithm="rloo", **options)
    found = logp_of(Scorer(load_model(str(tmp_path / "out"), dtype=torch.float64, device=torch.device("cpu"))))
    least, most, reached = (float(theory.objective(x, ref, world.REWARD, BETA)) for x in (ref, best, found))
    gain = (reached - least) / (most - least)
    assert distance(found, best, f"RLOO at default options, {gain:.1%} of the gain") <= 0.05 and gain > 0.9
