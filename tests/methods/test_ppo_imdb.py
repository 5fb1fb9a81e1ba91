"""A real model and a real judge: tiny-imdb learns from VADER what it likes, at a small divergence."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import prefopt
from methods.test_ppo import metrics
from prefopt.core.statistics import mean_interval
from prefopt.rewards import load_reward
from prefopt.runs.callbacks import Callback, RunInfo

STEPS = 4


class Enough(Callback):
    """The first steps of a longer run."""

    def on_step(self, run: RunInfo, step: int, metrics: Any) -> None:
        if step == STEPS:
            run.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_score_rises_at_a_small_divergence(tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    demo = resources.files("prefopt.demo")
    openings = demo.joinpath("openings.txt").read_text("utf-8").splitlines()
    prefopt.ppo(
        str(demo.joinpath("tiny_imdb")),
        [{"prompt": opening} for opening in openings[32:]],
        reward="vader",
        output=tmp_path / "out",
        algorithm="rloo",
        num=4,
        batch_size=24,
        epochs=3,
        max_steps=10,
        max_new_tokens=24,
        learning_rate=2e-4,
        beta=0.03,
        device="cpu",
        dtype="float32",
        threads=1,
        progress="none",
        callbacks=[Enough()],
    )
    lines = metrics(tmp_path / "out")
    assert len(lines) == STEPS
    assert lines[-1]["objective/scores"] > lines[0]["objective/scores"] + 0.08
    assert 0.05 < lines[-1]["objective/kl"] < 3
    assert max(line["val/sampler_gap_max"] for line in lines) < 1e-3
    assert lines[-1]["objective/entropy"] > 0.7 * lines[0]["objective/entropy"]  # it still says many things


def scores(model: str, prompts: list[str], output: Path) -> list[float]:
    """What VADER says of fresh samples of a model, a mean for each prompt."""
    rows = [{"prompt": prompt} for prompt in prompts]
    how: dict[str, Any] = {"num": 16, "max_new_tokens": 12, "device": "cpu", "dtype": "float32", "progress": "none"}
    prefopt.sample(model, rows, output=output, seed=100, **how)
    vader = load_reward("vader")
    found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in found] == prompts
    return [fmean(vader([row["prompt"]] * 16, row["responses"])) for row in found]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ppo_raises_the_score_on_openings_it_never_wrote_on(tmp_path: Path) -> None:
    """Seeds 0 and 1 were tried: at 99.9 % the rise was 0.11 to 0.35 (8 samples) and 0.10 to 0.28 (16)."""
    pytest.importorskip("vaderSentiment")
    demo = resources.files("prefopt.demo")
    model = str(demo.joinpath("tiny_imdb"))
    lines = demo.joinpath("openings.txt").read_text("utf-8").splitlines()
    openings = [" ".join(line.split()[:5]) for line in lines]
    held_out, prompts = openings[:33], openings[33:]
    assert not set(held_out) & set(prompts)
    prefopt.ppo(
        model,
        [{"prompt": opening} for opening in prompts],
        reward="vader",
        output=tmp_path / "out",
        critic="head",
        num=4,
        batch_size=24,
        epochs=10,
        max_steps=12,
        ppo_epochs=2,
        max_new_tokens=12,
        learning_rate=4e-4,
        critic_learning_rate=1e-3,
        beta=0.03,
        device="cpu",
        dtype="float32",
        threads=1,
        progress="none",
    )
    before, after = (
        scores(name, held_out, tmp_path / f"{n}.jsonl") for n, name in enumerate([model, str(tmp_path / "out")])
    )
    rise = mean_interval([b - a for a, b in zip(before, after, strict=True)], level=0.99)
    assert rise.low > 0, str(rise)
    last = metrics(tmp_path / "out")[-1]
    assert 0.5 < last["objective/kl"] < 6 and last["val/length"] > 8  # bought with few nats, and not by falling silent
