"""From the objective of RLHF to the loss of DPO, step by step, with numbers: every response is listed.

    python examples/closed_form.py

Equations are those of Rafailov et al. 2023 (arXiv 2305.18290); docs/derivation.md explains them.
"""

from __future__ import annotations

import itertools

import numpy as np

from prefopt import theory

RESPONSES = ["yes", "no", "maybe", "I cannot say"]
REF = theory.normalised(np.log([0.4, 0.3, 0.2, 0.1]))
REWARD = np.array([1.0, -0.5, 0.5, 0.0])
BETA = 0.5


def table(title: str, **columns: np.ndarray) -> None:
    """A line for each response."""
    print(f"\n{title}")
    print(" " * 14 + "".join(f"{name:>16}" for name in columns))
    for y, name in enumerate(RESPONSES):
        print(f"  {name:<12}" + "".join(f"{column[y]:16.6f}" for column in columns.values()))


def same(what: str, one: object, other: object) -> None:
    """Two ways to the same number, and how far apart they are."""
    gap = float(np.max(np.abs(np.asarray(one, float) - np.asarray(other, float))))
    print(f"  {what}: difference {gap:.1e}")
    assert gap < 1e-12


def main() -> None:
    """Every step, printed."""
    table("One prompt, four responses, beta = 0.5", reference=np.exp(REF), reward=REWARD)

    log_z = theory.log_partition(REF, REWARD, BETA)
    best = theory.optimal_logp(REF, REWARD, BETA)
    table(
        f"Equation 4: the optimum ref exp(r / beta) / Z, log Z = {log_z[0]:.6f}",
        optimum=np.exp(best),
        log_ratio=best - REF,
    )
    value = theory.objective(best, REF, REWARD, BETA)
    print(f"  E[r] - beta KL = {float(value):.6f}")
    same("which is beta log Z", value, BETA * log_z[0])
    other = theory.normalised(REWARD)
    lost = value - theory.objective(other, REF, REWARD, BETA)
    same("another policy loses beta KL(it || optimum)", lost, BETA * theory.kl(other, best))

    print("\nEquation 5: the reward that a policy is the optimum of")
    same("beta log-ratio + beta log Z is the reward", theory.implied_reward(best, REF, BETA, log_z), REWARD)

    implied = theory.implied_reward(best, REF, BETA)
    table("Without log Z it is another one", reward=REWARD, implied=implied, gap=REWARD - implied)
    print("\nEquation 6: log Z cancels in every preference")
    same("Bradley-Terry of both", theory.bradley_terry(implied), theory.bradley_terry(REWARD))
    assert theory.same_class(REWARD, implied)

    weight = theory.pair_weights(theory.bradley_terry(REWARD), np.exp(REF))
    print("\nEquation 7: the loss of DPO over all pairs, drawn from the reference")
    for name, logp in (("the reference", REF), ("another policy", other), ("the optimum", best)):
        slope = theory.through_softmax(theory.dpo_gradient(logp, REF, weight, BETA), logp)
        print(f"  {name:<16} loss {theory.dpo_loss(logp, REF, weight, BETA):.6f}, gradient {np.abs(slope).max():.6f}")

    print("\nRankings: Plackett-Luce, whose chances add up and whose pairs are Bradley-Terry's")
    orders = list(itertools.permutations(range(len(RESPONSES))))
    chance = np.exp([theory.plackett_luce(implied, order) for order in orders])
    same("all orders together", chance.sum(), 1.0)
    first = sum(p for p, order in zip(chance, orders, strict=True) if order.index(0) < order.index(1))
    same("yes before no", first, theory.bradley_terry(REWARD)[0, 1])

    print("\nLabels without doubt: yes always beats no")
    two, sure = theory.normalised(REF[:2]), np.array([[0.5, 1.0], [0.0, 0.5]])
    ipo = theory.ipo_optimum(sure, [0.5, 0.5], two, BETA) - two
    same("IPO's log-ratios differ by 1 / (2 tau)", ipo[0] - ipo[1], 0.5 / BETA)
    only = np.array([[0.0, 1.0], [0.0, 0.0]])
    losses = [theory.dpo_loss(theory.normalised([z, 0.0]), two, only, BETA) for z in (1.0, 10.0, 100.0)]
    print("  DPO's loss only falls: " + ", ".join(f"{x:.2g}" for x in losses))


if __name__ == "__main__":
    main()
