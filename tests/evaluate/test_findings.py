"""What a comparison says of training is said where its numbers carry it, and not where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prefopt
from evaluate.small import write_run
from prefopt.core.statistics import mean_interval
from prefopt.evaluate.length_control import length_controlled
from prefopt.evaluate.result import PairResult, findings
from prefopt.evaluate.samples import SampleStats
from prefopt.evaluate.win_rate import win_rate
from train.small import dpo, write_model, write_rows

PROMPTS = 200


def versus(
    first: str, second: str, wins: float, *, longer: float = 0.0, slope: float = 0.0, n: int = PROMPTS
) -> PairResult:
    """Two models of which the first wins so often at equal length, and is longer by so many characters."""
    rng = np.random.default_rng(0)
    lengths = rng.normal(longer, 50, (n, 1))
    chance = 1 / (1 + np.exp(-(np.log(wins / (1 - wins)) + slope * lengths / 50)))
    outcomes = (rng.random((n, 1)) < chance).astype(float)
    equal = length_controlled(outcomes, lengths)
    return PairResult(first, second, win_rate(outcomes), equal, longer=mean_interval(lengths[:, 0]))


def samples(repetition: float, count: int = PROMPTS) -> SampleStats:
    return SampleStats(count, count, 20.0, 100.0, 2.0, repetition, 0)


def names(v: PairResult, models: Any = ()) -> list[str]:
    return [f.name for f in findings(v, dict(models))]


def test_a_win_by_length_alone_is_told_of_either_side() -> None:
    alone = versus("long", "short", 0.5, longer=100, slope=1.5)
    (found,) = findings(alone, {})
    assert found.name == "length exploited" and found.look
    assert "long wins 9" in found.text and "longer by 101" in found.text and "--loss r_dpo or ld_dpo" in found.text
    turned = versus("short", "long", 0.5, longer=-100, slope=1.5)
    (found,) = findings(turned, {})
    assert found.text.startswith("long wins 9") and "longer by 99" in found.text
    apart = versus("long", "short", 0.5, longer=300, slope=9.0)
    assert apart.equal_length is not None and apart.equal_length.rate is None
    (found,) = findings(apart, {})
    assert "in every comparison" in found.text
    (found,) = findings(versus("short", "long", 0.5, longer=-300, slope=9.0), {})
    assert found.text.startswith("long wins")
    assert names(versus("a", "b", 0.8, longer=100, slope=0.5)) == [], "it is better at equal length too"
    assert names(versus("a", "b", 0.5, longer=100)) == [], "it is longer and wins nothing"
    assert names(versus("a", "b", 0.9, longer=0, slope=1.0)) == []
    assert names(versus("long", "short", 0.5, longer=100, slope=9.0, n=9)) == [], "too few prompts to tell"


def test_samples_that_repeat_themselves_are_told() -> None:
    level = versus("a", "b", 0.5)
    assert names(level, {"a": samples(0.3), "b": samples(0.02)}) == ["repeats itself"]
    (found,) = findings(level, {"a": samples(0.02), "b": samples(0.3)})
    assert found.text.startswith("samples of b repeat themselves: 30% of") and "2% in those of a" in found.text
    assert names(level, {"a": samples(0.3), "b": samples(0.2)}) == []
    assert names(level, {"a": samples(0.3, 5), "b": samples(0.02, 5)}) == []


def test_a_reward_that_rose_while_the_judge_says_worse_is_over_optimised(tmp_path: Path) -> None:
    start = str(tmp_path / "base")
    Path(start).mkdir()
    trained = str(write_run(tmp_path / "trained", options={"model": start}))
    (found,) = findings(versus(trained, start, 0.2), {})
    assert found.name == "over-optimised" and "rewards/margins from 0.00" in found.text
    assert f"worse than {start}, which it started from: it wins 2" in found.text and "a larger --beta" in found.text
    assert names(versus(start, trained, 0.8)) == ["over-optimised"], "whichever is named first"
    assert names(versus(trained, start, 0.8)) == [] == names(versus(trained, start, 0.5))
    assert names(versus(trained, str(tmp_path / "another"), 0.2)) == [], "nothing is known of how they go together"
    flat = str(write_run(tmp_path / "flat", options={"model": start}, fall=0.0))
    assert names(versus(flat, start, 0.2)) == [], "nothing was raised"
    # Of two runs from one start on the same data, that which went further is the worse.
    further = str(write_run(tmp_path / "further", options={"model": start}, fall=0.03))
    (found,) = findings(versus(further, trained, 0.2), {})
    assert "which was trained less far (to 0.02" in found.text
    assert names(versus(trained, further, 0.2)) == []
    other = str(write_run(tmp_path / "other", options={"model": start}, record={"data": "d2 90+10"}))
    assert names(versus(further, other, 0.2)) == []


def test_ppo_is_told_its_own_knobs(tmp_path: Path) -> None:
    start, run = str(tmp_path / "base"), tmp_path / "ppo"
    Path(start).mkdir()
    write_run(run, options={"model": start}, record={"method": "ppo"})
    lines = [{"step": i, "objective/scores": 0.1 * i} for i in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = findings(versus(str(run), start, 0.1), {})
    assert "objective/scores from" in found.text and "a lower --kl-target" in found.text


@pytest.mark.slow
@pytest.mark.parametrize("planted", [True, False])
def test_a_planted_run_is_seen_through(planted: bool, tmp_path: Path) -> None:
    """Preferences for vowels: a judge of vowels is content with what they teach, one of consonants is not."""
    chance = np.random.default_rng(0)

    def text(letters: str) -> str:
        return "".join(chance.choice(list(letters), 6))

    rows = [{"prompt": f"{text('klm')}{i}: ", "chosen": text("aeiou"), "rejected": text("xyz")} for i in range(48)]
    start = write_model(tmp_path / "start")
    dpo(start, rows, tmp_path / "out", learning_rate=5e-3, epochs=3)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"{text('klm')}{i}: "} for i in range(60)])
    letters = "xyz" if planted else "aeiou"

    def judge(prompts: Any, responses: Any) -> list[float]:
        return [float(sum(c in letters for c in r)) / (1 + len(r)) for r in responses]

    quick: dict[str, Any] = {"dtype": "float32", "device": "cpu", "progress": "none", "max_new_tokens": 12}
    found = prefopt.compare(tmp_path / "out", start, prompts, judge=judge, **quick)
    assert [f.name for f in found.findings if f.name == "over-optimised"] == ["over-optimised"] * planted
