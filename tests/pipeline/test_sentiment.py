"""The recipe of controlled sentiment on the model that comes with prefopt, with little of everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.cli import main
from prefopt.config.frontier import FrontierConfig
from prefopt.core.files import expanded
from prefopt.core.yaml_file import read_document
from prefopt.sweeps.points import read_frontier

RECIPE = "prefopt:recipes/sentiment.yaml"


def test_the_recipe_is_whole() -> None:
    config = FrontierConfig.from_dict(read_document(RECIPE))
    methods = [t.method for t in config.trainings()]
    assert {r: methods.count(r) for r in methods} == dict.fromkeys(
        ("dpo", "ppo-true", "ppo-learned", "sft", "unlikelihood", "best-of"), 3
    )
    assert (expanded(config.model) / "model.safetensors").exists() and expanded(config.prompts[0]).exists()


@pytest.mark.slow
def test_two_points_of_every_road(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vaderSentiment")
    monkeypatch.chdir(tmp_path)  # outside of a clone
    methods = ["dpo:beta=0.1,1", "ppo-true:beta=0.01,0.1", "ppo-learned:beta=0.01,0.1", "sft:learning_rate=1e-4,4e-4"]
    methods += ["unlikelihood:alpha=0.1,0.5", "best-of:n=2,8"]
    little = ["--responses", "64", "--rounds", "1", "--num", "2", "--checkpoints", "1", "--held-out", "24"]
    little += ["--max-new-tokens", "12", "--methods", *methods, "--progress", "none"]
    ppo = ["--ppo", "batch_size=16", "learning_rate=1e-4", "critic=head", "ppo_epochs=2"]
    words = ["frontier", "--config", RECIPE, "--output", str(tmp_path / "out"), *little, *ppo]
    assert main(words) == 0
    found = read_frontier(tmp_path / "out")
    assert found.finished and len(found.points) == 13
    points = {(p.method, p.setting): p for p in found.points}
    start, best = points["reference", ""], points["best-of", "n=8"]
    assert best.interval is not None and start.reward is not None and best.interval[0] > start.reward
    assert all(p.kl is not None and p.kl > 0 for p in found.points[1:])
    assert " * " in capsys.readouterr().out and (tmp_path / "out/frontier.svg").exists()
