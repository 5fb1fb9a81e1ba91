"""Rates are chosen with equal trials, on prompts that are neither trained on nor reported."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import prefopt
from pipeline.sweeping import PROMPTS, REWARD, count_loads, frontier_config
from prefopt.config.frontier import FrontierConfig
from prefopt.core.files import write_json
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.evaluate.choices import ChoiceTask
from prefopt.generate.model_io import SampledModel
from prefopt.sweeps import frontier
from prefopt.sweeps.points import Done, Frontier, Point, read_frontier
from train.small import write_rows

METHODS = ["dpo:beta=0.1,1", "rloo-learned:kl_target=3,6", "best-of:n=2,4"]


def config(place: Path, output: Path, **changes: Any) -> FrontierConfig:
    tuned = {"rate_factors": ["0.5", "4"], "tune": 3, "kl_at": ["1", "0.5"], "methods": METHODS}
    text = write_rows(output.parent / "text.jsonl", [{"text": "abc"}, {"text": "fed"}])
    rloo = ["batch_size=4", "num=2", "learning_rate=2e-3"]
    return frontier_config(place, output, **{**tuned, "rloo": rloo, "perplexity": [text], **changes})


@pytest.fixture(scope="module")
def sweep(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Frontier, Path, Counter[str]]:
    """A sweep of two seeds, and how often each folder was trained into."""
    output, trained = tmp_path_factory.mktemp("out") / "all", Counter[str]()
    train = frontier.train_once

    def counted(given: Any, *callbacks: Any) -> None:
        trained[given.output] += not (Path(given.output) / "model.safetensors").exists()
        train(given, *callbacks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(output.with_name("cache")))
        patch.setattr("prefopt.train.budget.matmul_peak", lambda *_: 1e10)
        patch.setattr(frontier, "train_once", counted)
        loaded = count_loads(patch)
        found = frontier.run(config(place, output, seeds=2))
    assert loaded == [REWARD], "one for both sets of prompts: it may be a large model"
    return found, output, trained


def prompts(file: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in file.read_text().splitlines()}


def test_prompts_are_dealt_into_three(sweep: tuple[Frontier, Path, Counter[str]]) -> None:
    found, output, _ = sweep
    parts = [prompts(output / f"data/{name}.jsonl") for name in ("train", "tune", "held_out")]
    assert [len(part) for part in parts] == [9, 3, 6] and set.union(*parts) == set(PROMPTS)
    assert prompts(output / "data/scored.jsonl") == parts[0]
    assert prompts(output / "tune/dpo/beta=1-seed0-rate4/samples.jsonl") == parts[1]
    folder = next(p.folder for p in found.points if (p.method, p.seed) == ("dpo", 1))
    assert prompts(output / folder / "samples-2.jsonl") == parts[2]


def test_every_method_has_as_many_trials_and_one_rate_for_all_its_trainings(
    sweep: tuple[Frontier, Path, Counter[str]],
) -> None:
    found, output, trained = sweep
    assert [(t.method, t.factor) for t in found.tuning] == [(m, f) for m in ("dpo", "rloo-learned") for f in (0.5, 4.0)]
    chosen = {t.method: t.factor for t in found.tuning if t.chosen}
    for method, factor in chosen.items():
        areas = {t.factor: t.area or 0.0 for t in found.tuning if t.method == method}
        assert areas[factor] == max(areas.values())
    assert set(chosen) == {"dpo", "rloo-learned"}
    for p in found.points[1:]:
        assert p.factor == chosen.get(p.method, 1.0)
        name = "rloo" if p.method == "rloo-learned" else "dpo"
        if p.method != "best-of":
            record = json.loads((output / p.folder / "run.json").read_text())["options"]
            assert record["learning_rate"] == pytest.approx(2e-3 * p.factor) and record.get("algorithm", name) == name
    # Two rates at two settings with the first seed, the chosen one with the second too; none of them twice.
    folders = Counter(Path(folder).parent.name for folder in trained if "reward-seed" not in folder)
    assert folders == {"dpo": 6, "rloo-learned": 6} and set(trained.values()) == {1}
    assert not list(output.glob("*/*/checkpoints")), "nor are checkpoints left"


def test_points_hold_what_a_comparison_needs(sweep: tuple[Frontier, Path, Counter[str]]) -> None:
    found, output, _ = sweep
    assert found.kl_at == (0.5, 1.0) and found.tune == 3 and read_frontier(output) == found
    for p in found.points:
        assert len(p.rewards) == 6 and p.reward == pytest.approx(sum(p.rewards) / 6)
        assert (p.kls == ()) == (p.kl_is == "bound") and (p.perplexity is None) == (p.method == "best-of")
        if p.kls:
            assert p.kl == pytest.approx(sum(p.kls) / 6, abs=1e-12)
        assert bool(p.costs) == (p.method in ("dpo", "rloo-learned"))
    learned = next(p for p in found.points if p.method == "rloo-learned")
    own, reward = (json.loads((output / n / "run.json").read_text())["costs"] for n in (learned.folder, "reward-seed0"))
    assert learned.costs["trained_tokens"] == own["trained_tokens"] + reward["trained_tokens"]
    assert learned.plateau is not None, "RLOO is tested for a plateau as PPO is"


def test_a_finished_sweep_trains_nothing_and_may_be_compared_at_other_kls(
    sweep: tuple[Frontier, Path, Counter[str]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, output, _ = sweep
    monkeypatch.setattr(frontier, "train_once", lambda c, *_: pytest.fail(f"{c.output} is trained again"))
    given = config(place, output, seeds=2)
    again = frontier.run(replace(given, kl_at=["0.5", "1", "3"]))
    assert again.points == found.points and again.kl_at == (0.5, 1.0, 3.0)


def test_rates_need_prompts_to_be_chosen_on(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rate-factors: several are chosen from on prompts of their own"):
        config(place, tmp_path / "out", tune=None)
    with pytest.raises(ConfigError, match="--kl-at -1: it must be a number above 0"):
        config(place, tmp_path / "out", kl_at=["-1"])
    with pytest.raises(ConfigError, match="a factor is a duplicate"):
        config(place, tmp_path / "out", rate_factors=["1", "1.0"])
    with pytest.raises(DataError, match="--held-out 6 and --tune 12 leave none to train on"):
        frontier.run(config(place, tmp_path / "out", tune=12))


def test_a_sweep_at_one_rate_goes_on_with_others_and_is_reported_on_the_way(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained at the given rate is a trial later, and a task that comes later is answered by the policies that
    are there. A report trains nothing, and says what is missing."""
    monkeypatch.setattr("prefopt.train.budget.matmul_peak", lambda *_: 1e10)
    output, methods = tmp_path / "out", ["dpo:beta=0.1", "best-of:n=2"]
    given: dict[str, Any] = {"methods": methods, "tune": 3, "kl_at": ["0.1"]}
    with pytest.raises(RunError, match="holds no sweep to report"):
        frontier.run(frontier_config(place, output, report_only=True, **given))
    first = frontier.run(frontier_config(place, output, **given))
    assert first.finished and first.tuning == () and len(first.points) == 3
    made = (output / "dpo/beta=0.1-seed0/model.safetensors").stat().st_mtime_ns

    questions = [{"prompt": p, "responses": ["ab", "fd"], "order": [0, 1]} for p in ("a", "b", "c", "d")]
    more = given | {"rate_factors": ["1", "2"], "task": [write_rows(tmp_path / "task.jsonl", questions)]}
    before = (output / "sweep.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(frontier, "train_once", lambda c, *_: pytest.fail(f"{c.output} is trained"))
        so_far = frontier.run(frontier_config(place, output, report_only=True, **more))
    assert not so_far.finished and so_far.points == first.points == read_frontier(output).points
    assert so_far.done == (Done("dpo", 1, 2, 1, 1), Done("best-of", 0, 0, 1, 1)), "a trial was kept on the way"
    assert (output / "sweep.json").read_bytes() == before and so_far.task is None, "no policy answered it"

    found = frontier.run(frontier_config(place, output, **more))
    assert found.finished and (output / "dpo/beta=0.1-seed0/model.safetensors").stat().st_mtime_ns == made
    assert found.done == (Done("dpo", 2, 2, 1, 1), Done("best-of", 0, 0, 1, 1))
    assert [(t.factor, t.area is not None) for t in found.tuning] == [(1.0, True), (2.0, True)]
    start, dpo, best_of = found.points
    assert start.rewards == first.points[0].rewards and best_of.task == ()
    reference = SampledModel(str(place / "m"), device="cpu", dtype="float32")
    task = ChoiceTask(more["task"], reference.tokenizer, reference.context)
    assert start.task == task(reference)
    assert dpo.task == task(SampledModel(str(output / dpo.folder), device="cpu", dtype="float32"))
    write_rows(tmp_path / "task.jsonl", questions[:3])
    with pytest.raises(RunError, match="a sweep with other questions than those of --task"):
        frontier.run(frontier_config(place, output, **more))


@pytest.mark.slow
def test_a_task_that_comes_later_is_answered_by_what_was_trained_on_an_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--model`` is an adapter: what is trained on it is one that names the base itself."""
    monkeypatch.setattr("prefopt.train.budget.matmul_peak", lambda *_: 1e10)
    rows = [{"prompt": p, "chosen": "ab", "rejected": "fd"} for p in "abcdef"]
    made = {"output": str(tmp_path / "adapter"), "lora": True, "batch_size": 3, "eval_fraction": 0.0}
    prefopt.dpo(str(place / "m"), rows, learning_rate=3e-2, device="cpu", dtype="float32", progress="none", **made)
    given: dict[str, Any] = {"model": str(tmp_path / "adapter"), "methods": ["dpo:beta=0.1"]}
    frontier.run(frontier_config(place, tmp_path / "out", **given))
    questions = [{"prompt": p, "responses": ["ab", "fd"], "order": [0, 1]} for p in "abcd"]
    task = [write_rows(tmp_path / "task.jsonl", questions)]
    found = frontier.run(frontier_config(place, tmp_path / "out", task=task, **given))
    for point, folder in zip(found.points, (tmp_path / "adapter", tmp_path / "out/dpo/beta=0.1-seed0"), strict=True):
        policy = SampledModel(str(folder), device="cpu", dtype="float32")
        assert point.task == ChoiceTask(task, policy.tokenizer, policy.context)(policy)


def test_questions_are_the_same_by_any_name_and_others_if_a_file_in_their_folder_changed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, row = tmp_path / "questions", {"prompt": "a", "responses": ["ab", "fd"], "order": [0, 1]}
    folder.mkdir()
    file = write_rows(folder / "q.jsonl", [row])
    given = frontier_config(place, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for name in (file, str(folder), "questions", "questions/q.jsonl", "questions/*.jsonl"):
        frontier.take_folder(given, frontier.MAY_GROW, task=[name])
    write_rows(folder / "q.jsonl", [row | {"order": [1, 0]}])
    for name in (str(folder), "questions/*.jsonl"):
        with pytest.raises(RunError, match="a sweep with other questions than those of --task"):
            frontier.take_folder(given, frontier.MAY_GROW, task=[name])


@pytest.mark.parametrize("factors", [["0.5", "2"], ["2", "0.5"], ["1", "2", "0.5"]])
def test_while_rates_are_open_a_report_shows_the_rate_that_was_trained(
    factors: list[str], place: Path, tmp_path: Path
) -> None:
    """A sweep that began with 0.5 times the rate of its method."""
    numbers: dict[str, Any] = {"interval": (0.0, 0.2), "kl_se": 0.0, "length": 20.0, "rewards": (0.0, 0.2)}
    start = Point("reference", "", 0, 0, reward=0.1, kl=0.0, kls=(0.0, 0.0), folder="reference", **numbers)
    name = "dpo/beta=0.1-seed0-rate0.5"
    trained = replace(start, method="dpo", setting="beta=0.1", factor=0.5, kl=2.0, kls=(1.0, 3.0), folder=name)
    given = frontier_config(place, tmp_path / "out", rate_factors=factors, tune=3, report_only=True)
    frontier.take_folder(given, frontier.MAY_GROW)
    for point in (start, trained):
        write_json(tmp_path / "out" / point.folder / "points.json", [asdict(point)])
    found = frontier.run(given)
    assert [(p.method, p.factor) for p in found.points] == [("reference", 1.0), ("dpo", 0.5)]
    assert "dpo at 0.5 times its rate" in "\n".join(found.lines())
