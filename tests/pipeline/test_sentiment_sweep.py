"""A sweep in parts: it goes on from the points that were kept, and trains none of them again."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.sweeping import frontier_config
from prefopt.config.frontier import FrontierConfig
from prefopt.core.yaml_file import read_document
from prefopt.sweeps import frontier

ROOT = Path(__file__).resolve().parents[2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("sentiment_sweep", ROOT / "benchmarks/sentiment_sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_points_that_were_kept_are_those_of_the_sweep_that_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["dpo:beta=0.1", "ppo-true:kl_target=3", "best-of:n=2"]
    given: dict[str, Any] = {"methods": methods, "rate_factors": ["1", "2"], "tune": 3}
    first = frontier.run(frontier_config(place, tmp_path / "first", **given))
    count = script().save(tmp_path / "first", tmp_path / "kept.json")
    assert count == len(first.points) + 5, "two rates of two methods, and the reference on the prompts for that"
    assert (tmp_path / "kept.json").stat().st_size < 30_000 and "token_ids" not in (tmp_path / "kept.json").read_text()

    assert script().restore(tmp_path / "kept.json", tmp_path / "second", [str(place / "p.txt")]) == count
    monkeypatch.setattr(frontier, "train_once", lambda c, *_: pytest.fail(f"{c.output} is trained again"))
    config = frontier_config(place, tmp_path / "second", **given)
    second = frontier.run(config)
    for one, two in zip(first.points, second.points, strict=True):
        assert two.rewards == pytest.approx(one.rewards, abs=1e-6) and two.kls == pytest.approx(one.kls, abs=1e-6)
        rest: dict[str, Any] = {"rewards": (), "kls": (), "earlier": (), "plateau": None, "why_not": None}
        assert replace(two, **rest) == replace(one, **rest)
    chosen = [[(t.method, t.factor, t.chosen) for t in found.tuning] for found in (first, second)]
    assert chosen[0] == chosen[1]
    monkeypatch.undo()
    monkeypatch.setattr("prefopt.train.budget.matmul_peak", lambda *_: 1e10)
    more = frontier.run(replace(config, seeds=2))
    assert len(more.points) == len(second.points) + 2, "another seed of the two that train"


def test_the_recipe_has_equal_trials_whose_targets_overlap() -> None:
    config = FrontierConfig.from_dict(read_document("prefopt:recipes/frontier.yaml"))
    assert len(list(config.trials())) == 36 and len(list(config.trainings())) == 39
    assert len(config.factors) == 3 and config.tune == 16 and config.targets == (1.0, 2.0, 4.0, 8.0)
