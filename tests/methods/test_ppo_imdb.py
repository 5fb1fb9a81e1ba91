"""A real model and a real judge: tiny-imdb learns from VADER what it likes, at a small divergence."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import prefopt
from methods.test_ppo import metrics
from prefopt.train.callbacks import Callback, RunInfo

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
