"""The tables of a sweep: what they hold, and what they say where there is too little."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.core.statistics import holm
from prefopt.sweeps.compared import curves_of, dominance, tables
from prefopt.sweeps.finished import chosen_rates
from prefopt.sweeps.fixed_kl import permutation_test, rewards_at
from prefopt.sweeps.points import Done, Frontier, Point, Trial, read_frontier
from prefopt.sweeps.report import frontier_section, lines

COSTS = {"models": 4, "model_bytes": 1e9, "forward_passes": 1234.0, "trained_tokens": 5e4, "seconds": 75.0}


def points(method: str, gain: float, seeds: int, reach: float = 9.0, **more: Any) -> list[Point]:
    """Trainings at three KLs, whose rewards rise with the root of the KL."""
    found = []
    for seed in range(seeds):
        rng = np.random.Generator(np.random.PCG64([seed, *method.encode()]))
        for n, kl in enumerate((1.0, 4.0, reach)):
            kls = kl + rng.normal(0, 0.3, 40)
            rewards = gain * kl**0.5 + rng.normal(0, 0.1, 40)
            values = {"reward": float(rewards.mean()), "kl": float(kls.mean()), "interval": (0.0, 1.0), "kl_se": 0.1}
            values |= {"rewards": tuple(rewards.tolist()), "kls": tuple(kls.tolist()), "perplexity": 50 + 2 * kl**0.5}
            found.append(Point(method, f"x={n}", seed, 10, **{**values, "costs": COSTS, **more}))
    return found


def sweep(*parts: list[Point], **more: Any) -> Frontier:
    zeros = (0.0,) * 40
    start = Point("reference", "", 0, 0, reward=0.0, interval=(0, 0), kl=0.0, kl_se=0.0, rewards=zeros, kls=zeros)
    every = (replace(start, perplexity=50.0), *(p for part in parts for p in part))
    given = {"finished": True, "kl_at": (1.0, 2.25, 6.25), **more}
    return Frontier("m", "vader", 40, 4, 48, points=every, **given)


def by_title(found: Frontier) -> dict[str, Any]:
    return {table.title.partition(":")[0].partition(" to ")[0]: table for table in tables(found)}


def test_methods_are_compared_where_all_their_seeds_have_been() -> None:
    found = sweep(points("dpo", 0.3, 4), points("ppo-true", 0.2, 4, reach=5.0))
    at, less = by_title(found)["Reward at fixed KL, nats"], by_title(found)["Differences of reward at fixed KL"]
    assert at.head == ("method", "at 1", "at 2.25", "at 6.25", "best")
    dpo, ppo = at.rows
    assert [float(cell.split()[0]) for cell in dpo[1:4]] == pytest.approx([0.3, 0.45, 0.75], abs=0.03)
    best = max(p.reward or 0.0 for p in found.points if p.method == "dpo")
    assert ppo[3] == "not reached" and dpo[4].startswith(f"{best:.3f} at ")
    one, other = ([*curves_of(found, method).values()] for method in ("dpo", "ppo-true"))
    expected = rewards_at(one, found.kl_at, others=other)
    assert expected[1] is not None and f"{expected[1].mean:+.3f} ({expected[1].low:+.3f}" in less.rows[0][2]
    assert less.rows[0][0] == "dpo less ppo-true" and less.rows[0][3] == "not reached"


def test_a_judge_shows_a_reward_that_is_over_optimised() -> None:
    """The reward goes on rising with the root of the KL, what the judge sees of it falls beyond 4 nats."""
    judged = {1.0: 0.5, 4.0: 0.8, 9.0: 0.2}
    trained = [
        replace(p, judged=tuple(k * judged[round(p.kl or 0)] for k in np.linspace(0.5, 1.5, 40)))
        for p in points("ppo-learned", 0.3, 2)
    ]
    found = sweep(trained, judge="other")
    assert "Judged by other, at fixed KL, nats" not in by_title(found)  # the reference was not judged
    start = replace(found.points[0], judged=(0.1,) * 40)
    table = by_title(replace(found, points=(start, *found.points[1:])))["Judged by other, at fixed KL, nats"]
    (row,) = table.rows
    assert [float(cell.split()[0]) for cell in row[1:3]] == pytest.approx([0.5, 0.65], abs=0.03)
    assert float(row[3].split()[0]) == pytest.approx(0.5, abs=0.05) and row[4].startswith("0.200 at 9")
    assert "0.100 of the reference" in table.note


def test_areas_are_tested_over_seeds_and_corrected_for_all_pairs() -> None:
    parts = points("dpo", 0.3, 5), points("sft", 0.2, 5), points("ppo-true", 0.2, 5)
    found = sweep(*parts)
    table = by_title(found)["Area under the frontier"]
    areas = {m: [c.area(6.25) for c in curves_of(found, m).values()] for m in ("dpo", "sft", "ppo-true")}
    pairs = [("dpo", "sft"), ("dpo", "ppo-true"), ("sft", "ppo-true")]
    p = holm([permutation_test(areas[a], areas[b]) for a, b in pairs])
    assert [row[0] for row in table.rows] == [f"{a}, {b}" for a, b in pairs]
    assert [row[2] for row in table.rows] == [f"p = {x:.2g}" for x in p] and p[0] < 0.05 < p[2]
    assert "corrected for 3 comparisons (Holm)" in table.note and "so few seeds" not in table.note
    chance = dominance(found, "dpo", "sft")
    assert table.rows[0][3].startswith(f"{chance.beaten} of 15 ({chance.average:.1f} by chance, p = ")
    few = by_title(sweep(points("dpo", 0.3, 3), points("sft", 0.2, 3)))["Area under the frontier"]
    assert "with so few seeds even the clearest difference has p = 0.1" in few.note


def test_best_of_has_its_bound_and_no_test() -> None:
    bound = [replace(p, step=0, kls=(), kl_is="bound", costs={}, perplexity=None) for p in points("best-of", 0.5, 1)]
    found = sweep(points("dpo", 0.3, 2), bound)
    (curve,) = curves_of(found, "best-of").values()
    assert np.ptp(curve.kl_SP, axis=1).tolist() == [0.0, 0.0, 0.0]
    by = by_title(found)
    assert [row[0] for row in by["Reward at fixed KL, nats"].rows] == ["dpo", "best-of"]
    assert [row[0] for row in by["Area under the frontier"].rows] == ["dpo", "best-of"], "one method alone is trained"
    assert [row[0] for row in by["Alignment tax"].rows] == ["dpo"] == [row[0] for row in by["Cost of a training"].rows]
    assert "dealt at random" not in "\n".join(line for line in lines(found) if "more reward at no more KL" in line)


def test_tax_cost_and_sensitivity_have_their_numbers() -> None:
    trials = tuple(Trial("dpo", f, a, f == 1) for f, a in ((0.5, 1.0), (1.0, 2.0), (2.0, None)))
    by = by_title(sweep(points("dpo", 0.3, 2), tuning=trials, tune=24))
    assert [float(x) for x in by["Alignment tax"].rows[0][1:]] == pytest.approx([52, 53, 55], abs=0.1)
    assert "50.0 before" in by["Alignment tax"].note
    assert by["Sensitivity"].rows == (("dpo", "1.00", "2.00 *", "diverged"),) and "24 prompts" in by["Sensitivity"].note
    assert by["Cost of a training"].rows[0][:4] == ("dpo", "4, 1.0 GB", "1,234", "50,000")
    assert "1 min 15 s" in by["Cost of a training"].rows[0]


def test_a_task_is_compared_at_equal_kl_by_question() -> None:
    """Accuracy falls with the root of the KL; the interval is that of questions, which have no part in the prompts."""
    rng = np.random.Generator(np.random.PCG64(0))
    before = (rng.random(400) < 0.9).astype(float)

    def answered(p: Point) -> Point:
        lost = rng.random(400) < 0.1 * (p.kl or 0.0) ** 0.5
        return replace(p, task=tuple((before * ~lost).tolist()))

    found = sweep([answered(p) for p in points("dpo", 0.3, 2)], points("sft", 0.2, 2), task=("questions.jsonl",))
    assert not [t for t in tables(found) if "on the task" in t.title], "the reference has not answered"
    start = replace(found.points[0], task=tuple(before.tolist()))
    found = replace(found, points=(start, *found.points[1:]))
    (table,) = [t for t in tables(found) if "on the task" in t.title]
    (row,) = table.rows
    assert row[0] == "dpo" and f"{before.mean():.3f} right before" in table.note and "400 questions" in table.note
    seen = [[float(x) for x in re.findall(r"[+-]\d\.\d+", cell)] for cell in row[1:4]]
    assert [mean for mean, _, _ in seen] == pytest.approx([-0.09, -0.135, -0.225], abs=0.03)
    # Two trainings, each with as many questions as errors say: about 0.02 either way.
    assert all(low < mean < high and 0.02 < high - low < 0.08 for mean, low, high in seen)
    assert "task: questions.jsonl" in "\n".join(lines(found))
    # A training that was not measured leaves its method out, and is not taken for one without a change.
    some = [replace(p, task=()) if (p.method, p.seed) == ("dpo", 1) else p for p in found.points]
    assert not [t for t in tables(replace(found, points=tuple(some))) if "on the task" in t.title]


def test_an_unfinished_sweep_says_what_is_missing(tmp_path: Path) -> None:
    done = (Done("dpo", 9, 9, 3, 9), Done("ppo-true", 4, 9, 0, 9), Done("best-of", 0, 0, 3, 3))
    trials = (Trial("dpo", 0.5, 1.0, False), Trial("dpo", 1.0, 1.0, True), Trial("ppo-true", 0.5, 2.0, False))
    found = sweep(points("dpo", 0.3, 1), tuning=trials, tune=24, done=done, finished=False)
    by, told = by_title(found), "\n".join(lines(found))
    assert by["Finished so far"].rows == (
        ("dpo", "9 of 9", "3 of 9"),
        ("ppo-true", "4 of 9", "0 of 9"),
        ("best-of", "-", "3 of 3"),
    )
    assert "the sweep is not finished: 13 of 18 trials of rates and 6 of 21 trainings are done" in told
    assert by["Sensitivity"].rows == (("dpo", "1.00", "1.00 *"), ("ppo-true", "2.00", "not tried yet"))
    assert read_frontier(found.write(tmp_path)) == found
    assert "13 of 18 trials of rates" in str(frontier_section(tmp_path))
    assert "Finished so far" not in by_title(replace(found, finished=True))


def test_sweeps_of_earlier_versions_have_no_such_tables(tmp_path: Path) -> None:
    """Their points kept no rewards of prompts. A new one comes back whole from its file, and is told everywhere."""
    trials = (Trial("dpo", 1.0, 2.0, True),)
    found = sweep(points("dpo", 0.3, 2), points("sft", 0.2, 2), tuning=trials, tune=24)
    assert read_frontier(found.write(tmp_path)) == found
    page = str(frontier_section(tmp_path))
    said = "\n".join(lines(found))
    for table in tables(found):
        assert table.title.split(",")[0] in page and all(cell in said for row in table.rows for cell in row)
    file = tmp_path / "frontier.json"
    old = json.loads(file.read_text())
    for name in ("kl_at", "tune", "tuning"):
        del old[name]
    for p in old["points"]:
        for name in ("factor", "rewards", "kls", "perplexity", "costs", "earlier", "earlier_step"):
            del p[name]
    file.write_text(json.dumps(old))
    assert tables(read_frontier(file)) == []


def test_the_rate_with_the_largest_area_is_chosen_and_a_diverged_one_never() -> None:
    def tried(method: str, factor: float, *values: tuple[float, float] | None) -> list[Point]:
        known = [{"counted": False} if v is None else {"kl": v[0], "reward": v[1]} for v in values]
        return [Point(method, f"x={n}", 0, 0, factor=factor, **v) for n, v in enumerate(known)]

    every = tried("dpo", 0.5, (1.0, 0.5), (2.0, 0.6)) + tried("sft", 0.5, None, None)
    every += tried("dpo", 1.0, (1.0, 0.5), (2.0, 0.9)) + tried("sft", 1.0, (1.0, 0.2), None)
    every += tried("dpo", 2.0, (5.0, 0.9), (9.0, 0.99)) + tried("sft", 2.0, None, None)
    found = chosen_rates(every, 0.1, 8.0)
    assert [(t.method, t.factor) for t in found if t.chosen] == [("dpo", 1.0), ("sft", 1.0)]
    areas = {(t.method, t.factor): t.area for t in found}
    assert areas["dpo", 1.0] == pytest.approx(0.4 * 1 + 0.8 * 6) and areas["sft", 2.0] is None
    assert areas["dpo", 2.0] == pytest.approx(0.8 * 3), "what lies beyond the limit is no part of it"
    assert [
        t.factor for t in chosen_rates(tried("dpo", 0.5, None) + tried("dpo", 1.0, None), 0.1, 8.0) if t.chosen
    ] == [0.5]
