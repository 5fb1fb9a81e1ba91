"""A sweep in parts: it goes on from the points that were kept, and trains none of them again."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.sweeping import frontier_config
from prefopt.config.frontier import FrontierConfig
from prefopt.core.files import write_json
from prefopt.core.yaml_file import read_document
from prefopt.sweeps import frontier
from prefopt.sweeps.points import Done, Point

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


def test_points_of_a_single_rate_are_kept_for_a_sweep_that_goes_on_with_several(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a version that kept no point of the rate: its training is made again, beside the points."""
    given: dict[str, Any] = {"methods": ["dpo:beta=0.1", "best-of:n=2"], "tune": 3}
    first = frontier.run(frontier_config(place, tmp_path / "first", rate_factors=["1"], **given))
    assert first.finished and first.tuning == ()
    assert script().save(tmp_path / "first", tmp_path / "kept.json") == len(first.points) + 2
    trained, train = list[str](), frontier.train_once
    monkeypatch.setattr(frontier, "train_once", lambda c, *rest: (trained.append(Path(c.output).name), train(c, *rest)))
    several = frontier_config(place, tmp_path / "second", rate_factors=["1", "2"], **given)
    script().restore(tmp_path / "kept.json", tmp_path / "second", [str(place / "p.txt")])
    second = frontier.run(several)
    assert second.finished and set(trained) == {"beta=0.1-seed0-rate2"}

    old = tmp_path / "old"
    script().restore(tmp_path / "kept.json", old, [str(place / "p.txt")])
    shutil.rmtree(old / "tune")
    kept = (old / "dpo/beta=0.1-seed0/points.json").read_bytes()
    again = frontier.run(replace(several, output=str(old)))
    assert (old / "dpo/beta=0.1-seed0/points.json").read_bytes() == kept
    for one, two in zip(second.tuning, again.tuning, strict=True):
        assert (one.factor, one.chosen) == (two.factor, two.chosen) and one.area == pytest.approx(two.area, abs=1e-5)


def test_a_report_without_points_and_prompts_that_are_missing_are_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no points yet; run this script without --report"):
        script().report(tmp_path / "none.json", "prefopt:recipes/frontier.yaml")
    write_json(tmp_path / "kept.json", {"prompts": "0123", "points": {}, "sweep": {"options": {}}})
    with pytest.raises(SystemExit, match=r"away\.txt: no such file"):
        script().restore(tmp_path / "kept.json", tmp_path / "out", [str(tmp_path / "away.txt")])
    assert not (tmp_path / "out").exists()


def test_kept_points_are_reported_with_what_is_missing_on_a_machine_without_their_prompts(tmp_path: Path) -> None:
    """Of a sweep that was stopped while rates were tried: the reference, and one trial."""
    numbers: dict[str, Any] = {"interval": (0.0, 0.2), "kl_se": 0.0, "length": 20.0, "rewards": (0.0, 0.2)}
    start = Point("reference", "", 0, 0, reward=0.1, kl=0.0, kls=(0.0, 0.0), **numbers)
    tried = replace(start, method="dpo", setting="beta=0.1", factor=0.5, reward=0.4, kl=2.0, kls=(1.0, 3.0))
    recipe = FrontierConfig.from_dict(read_document("prefopt:recipes/frontier.yaml"))
    prompts = str(tmp_path / "away.txt")
    Path(prompts).write_text("a\nb\n")
    frontier.take_folder(replace(recipe, output=str(tmp_path / "out"), prompts=[prompts]), frontier.MAY_GROW)
    kept = {"reference": [start], "tune/reference": [start], "tune/dpo/beta=0.1-seed0-rate0.5": [tried]}
    for name, points in kept.items():
        write_json(tmp_path / "out" / name / "points.json", [asdict(point) for point in points])
    file = tmp_path / "kept.json"
    assert script().save(tmp_path / "out", file) == 3 and str(tmp_path) not in file.read_text()
    found = script().report(file, "prefopt:recipes/frontier.yaml")
    assert found.done[0] == Done("dpo", 1, 9, 0, 9) and found.done[-1] == Done("best-of", 0, 0, 0, 3)
    assert not found.finished and found.points == (start,) and found.tuning == (), "no rate was tried with all settings"
    assert "the sweep is not finished: 1 of 36 trials of rates and 0 of 39 trainings are done" in "\n".join(
        found.lines()
    )
    Path(prompts).write_text("c\n")
    with pytest.raises(SystemExit, match="are not those of the points"):
        script().restore(file, tmp_path / "again", [prompts])


def test_the_sweep_begins_with_the_methods_that_say_most_at_one_rate() -> None:
    recipe = read_document("prefopt:recipes/frontier.yaml")
    first, whole = (FrontierConfig.from_dict(stage) for stage in script().stages(recipe))
    assert list(first.trials()) == [] and len(list(first.trainings())) == 30, "nine of three methods, and best-of-n"
    assert not {one.method for one in first.trainings()} & {"rloo-true"} and whole.rate_factors == ["0.5", "1", "2"]
    assert first.tune == whole.tune


def test_the_recipe_has_equal_trials_whose_targets_overlap() -> None:
    config = FrontierConfig.from_dict(read_document("prefopt:recipes/frontier.yaml"))
    assert len(list(config.trials())) == 36 and len(list(config.trainings())) == 39
    assert len(config.factors) == 3 and config.tune == 16 and config.targets == (1.0, 2.0, 4.0, 8.0)
