"""Tasks before and after: what lm-eval is asked, and what its results say. A module stands in for lm-eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from prefopt.cli import main
from prefopt.config.compare import CompareConfig
from prefopt.errors import ConfigError, DataError, RunError
from prefopt.evaluate.compare import run
from prefopt.evaluate.tasks import changes, read_task_results
from train.small import write_model, write_rows

Answers = dict[str, list[float]]


def results(answers: list[float], *, samples: bool = True) -> dict[str, Any]:
    """What simple_evaluate gives for one task of right and wrong answers."""
    x = np.array(answers)
    values = {"alias": "films", "acc,none": float(x.mean()), "acc_stderr,none": float(x.std(ddof=1) / len(x) ** 0.5)}
    found: dict[str, Any] = {
        "results": {"films": {**values, "bleu,all": 3.0, "bleu_stderr,all": "N/A"}},
        "n-samples": {"films": {"original": len(x), "effective": len(x)}},
        "higher_is_better": {"films": {"acc": True, "bleu": True}},
    }
    if samples:
        rows = [{"doc_id": i, "filter": "none", "acc": v} for i, v in enumerate(answers)]
        found["samples"] = {"films": rows[::-1]}
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """lm-eval, as it answers here: the base model is right in three of four questions, any other in half of those."""
    calls: list[dict[str, Any]] = []

    class TaskManager:
        def __init__(self, include_path: str | None = None) -> None:
            self.all_tasks = ["films", *([Path(include_path).name] if include_path else [])]

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        calls.append(options)
        print("a table that nobody asked for")
        if options["limit"] == 7:
            raise ValueError("no data\nhere")
        right = 1.0 if options["model_args"]["pretrained"].endswith("base") else 0.5
        return results([1.0 if i % 4 and (right == 1 or i % 3) else 0.0 for i in range(options["limit"] or 120)])

    package, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    tasks.TaskManager = TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return calls


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    write_rows(tmp_path / "p.jsonl", [{"prompt": "k1: "}, {"prompt": "k2: "}])
    folders = [write_model(tmp_path / name, seed) for seed, name in enumerate(("base", "aligned"))]
    return ["--a", folders[1], "--b", folders[0], "--prompts", str(tmp_path / "p.jsonl"), "--judge", "length"]


QUICK = ["--max-new-tokens=4", "--dtype=float32", "--device=cpu", "--progress=none"]


def test_models_are_put_through_tasks_and_the_tax_is_told(
    asked: list[dict[str, Any]], models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", *models, *QUICK, "--tasks", "films", "--task-folder", str(tmp_path / "own")]
    assert main([*words, "--json"]) == 0
    (v,) = json.loads(capsys.readouterr().out)["versus"]  # what lm-eval prints stands elsewhere
    acc = v["tasks"][0]
    assert (acc["task"], acc["metric"], acc["first"], acc["second"]) == ("films", "acc", 0.5, 0.75)
    one = np.array([1.0 if i % 4 and i % 3 else 0.0 for i in range(120)])
    two = np.array([1.0 if i % 4 else 0.0 for i in range(120)])
    assert acc["paired"] and acc["error"] == pytest.approx((one - two).std(ddof=1) / 120**0.5)
    assert asked[0]["model_args"]["dtype"] == "float32" and asked[0]["device"] == "cpu"
    assert main([*words, "--task-limit", "16"]) == 0
    said = capsys.readouterr().out
    assert asked[-1]["limit"] == 16 and "films acc: 0." in said and "16 questions" in said
    assert "bleu,all" in said and "without a standard error: nothing is shown" in said


def test_errors_of_tasks_are_one_line(
    asked: list[dict[str, Any]], models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *models, *QUICK, "--tasks", "filmz"]) == 2
    assert "lm-eval has no task filmz" in capsys.readouterr().err
    assert main(["compare", *models, *QUICK, "--tasks", "films", "--task-limit", "7"]) == 2
    said = capsys.readouterr().err
    assert "lm-eval failed on" in said and said.endswith("ValueError: no data\n")


def test_without_lm_eval_the_remedy_is_named_before_anything_is_drawn(
    models: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("prefopt.methods.sample.run", lambda *_, **__: pytest.fail("drawn for nothing"))
    assert main(["compare", *models, *QUICK, "--tasks", "films"]) == 2
    assert "pip install lm-eval" in capsys.readouterr().err


def test_results_that_lm_eval_wrote_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.7).astype(float).tolist()
    after = [x if i % 8 else 0.0 for i, x in enumerate(before)]
    files = []
    for name, answers in (("a", after), ("b", before)):
        files.append(str(tmp_path / f"{name}.json"))
        Path(files[-1]).write_text(json.dumps(results(answers, samples=False)))
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "p", "responses": ["x"]}])
    config = CompareConfig(
        a=str(tmp_path / "a.jsonl"), b=str(tmp_path / "b.jsonl"), judge="length", json=True, task_results=files
    )
    change = run(config).versus[0].tasks[0]
    assert not change.paired and change.difference == pytest.approx(np.mean(after) - np.mean(before))
    spread = [np.std(x, ddof=1) / 20 for x in (after, before)]
    assert change.error == pytest.approx(np.hypot(*spread)) and change.verdict == "worse"
    for text, said in (("{", "is not JSON"), ("{}", "holds no results of tasks"), ('{"results": {}}', "no metric")):
        Path(files[0]).write_text(text)
        with pytest.raises(DataError, match=said):
            read_task_results(files[0])
    with pytest.raises(DataError, match="cannot be read"):
        read_task_results(str(tmp_path / "none.json"))


def test_the_error_of_a_difference_is_scipys_where_questions_are_the_same() -> None:
    from scipy import stats

    from prefopt.evaluate.tasks import task_scores

    rng = np.random.default_rng(1)
    one, two = ((rng.random(300) < p).astype(float).tolist() for p in (0.6, 0.65))
    found = changes(task_scores(results(one), "one"), task_scores(results(two), "two"))[0]
    test = stats.ttest_rel(one, two)
    assert found.error is not None and found.difference / found.error == pytest.approx(test.statistic)
    # A metric that is no mean over its questions has no error question by question.
    off = results(one)
    off["results"]["films"]["acc,none"] += 0.05
    assert not changes(task_scores(off, "one"), task_scores(results(two), "two"))[0].paired


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task_limit": 3}, "--task-limit does nothing without --tasks"),
    ({"task_folder": "f"}, "--task-folder does nothing without --tasks"),
    ({"tasks": ["t"], "task_results": ["a", "b"]}, "leave --task-results or --tasks out"),
    ({"tasks": ["t"], "a": "m.jsonl"}, "--tasks needs models, and m.jsonl holds samples"),
    ({"task_results": ["a"]}, "names 1 files for 2 models"),
]


def test_contradictions_are_refused() -> None:
    for options, said in REFUSED:
        with pytest.raises(ConfigError, match=said):
            CompareConfig(**{"a": "m", "b": "n", "judge": "length", "prompts": ["p"], **options})


def test_the_real_lm_eval_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a local task of two models, where lm-eval is installed."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install prefopt[lm-eval]")
    from prefopt.evaluate.tasks import Harness

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"q": f"k{i}: ", "choices": ["aeiou", "xyzxy"], "gold": i % 2} for i in range(12)]
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": write_rows(tmp_path / "q.jsonl", rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letters.yaml").write_text(json.dumps(task))
    folders = {name: write_model(tmp_path / name, seed) for seed, name in enumerate("ab")}
    how = {"dtype": "float32", "device": "cpu"}
    harness = Harness(["letters"], task_folder=str(tmp_path / "own"))
    found = {name: harness.scores(name, folder, **how) for name, folder in folders.items()}
    (change,) = changes(found["a"], found["b"])
    assert change.paired and change.questions == 12 and 0 <= change.first <= 1
    with pytest.raises(RunError, match="lm-eval failed on none"):
        harness.scores("none", str(tmp_path / "none"), **how)
